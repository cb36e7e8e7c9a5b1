"A run that may be killed and started again: python kill_run.py FOLDER; prints a digest of its weights at the end."
import sys
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from cnnbook.callbacks import ModelCheckpoint
from cnnbook.data import Augment, Loader
from cnnbook.trace import digest
from cnnbook.trainer import Trainer
from cnnbook.world import shapes

EPOCHS, folder = 6, Path(sys.argv[1])
torch.manual_seed(0)
images = shapes(256, size=16)
train, valid = Loader(images, 32, Augment(flip=True, shift=2), shuffle=True), Loader(images, 64)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(.2),
                      nn.Linear(8*14*14, 10))
optimizer = torch.optim.SGD(model.parameters(), .05, momentum=.9)
saving = ModelCheckpoint(folder, monitor='valid_loss', every_n_train_steps=1)
trainer = Trainer(max_epochs=EPOCHS, callbacks=saving, enable_progress_bar=False)
print('begun', flush=True)
trainer.fit(model, train, valid, optimizer, nn.CrossEntropyLoss(), OneCycleLR(optimizer, .05, total_steps=8*EPOCHS),
            ckpt_path='last')
losses = [(row['train_loss'], row['valid_loss'], row['lr']) for row in trainer.history]
print('weights', digest(torch.cat([t.double().flatten() for t in model.state_dict().values()])), losses[-1])
