// Which boxes can overlap a given one? Found in cells of a grid, so that boxes far away cost nothing.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cnnbook {

constexpr double no_side = 1e-140;  // a box with a shorter side counts as one without area: its area loses digits

// Boxes are sorted into classes by size: in one class widths differ by less than a factor of 4, and so do heights.
// Each class has a grid of its own with cells as large as its largest box; a box lies in the cell of its centre. So a
// few huge boxes among many small ones neither fill thousands of cells nor share one with all the others.
// An Item has x1, y1, x2, y2 and a number `rank`; the grid holds copies, so that neighbours lie side by side in memory.
template <class Item>
class Near {
  public:
    // Pairs of interest share more than `share` of the wider one's width and of the higher one's height.
    // Boxes without area are never of interest.
    Near(const std::vector<Item>& items, double share);

    // Calls done(other) for each other item that may be of interest, perhaps twice; true drops it from the grid.
    template <class Done>
    void each(const Item& item, Done done);

  private:
    struct Class {
        double width, height;       // of a cell; a box has width / 4 <= w < width, and so for its height
        double per_x, per_y;        // 1 / width, 1 / height; exact, since both are powers of 2
        double x1, y1, x2, y2;      // where the centres lie
        std::int64_t columns, rows;
        std::size_t count, first, cells;  // boxes, number of its first cell, number of cells
        bool hashed;                // the grid would have far more cells than boxes: cells share places
    };
    struct Cell {
        std::uint32_t begin, size;  // in members_
    };
    struct Shape {
        double w, h, x, y;          // width, height, centre
        explicit Shape(const Item& b)
            : w(double{b.x2} - double{b.x1}), h(double{b.y2} - double{b.y1}), x(b.x1 + w / 2), y(b.y1 + h / 2) {}
    };

    std::uint32_t class_of(const Shape& s);
    void lay_out();

    // Cells between here and there. Beyond 2^50 a double has no digits left for one cell more.
    static std::int64_t step(double distance, double per_cell) {
        return distance > 0 ? static_cast<std::int64_t>(std::min(distance * per_cell, 0x1p50)) : 0;
    }

    static std::size_t place(const Class& c, std::int64_t column, std::int64_t row) {
        if (!c.hashed) return c.first + static_cast<std::size_t>(row * c.columns + column);
        std::uint64_t key = static_cast<std::uint64_t>(column) * 0x9e3779b97f4a7c15u;
        key = (key ^ (key >> 32)) + static_cast<std::uint64_t>(row);
        key *= 0xd6e8feb86659fd93u;
        return c.first + static_cast<std::size_t>((key >> 32) & (c.cells - 1));
    }

    // How far apart two centres may be: half of both widths, less the part that must be shared. The other box has at
    // most the width of a cell, and at most w / share.
    static double reach(double w, double cell, double share) {
        const double other = std::min(cell, share > 0.5 ? w : share * cell > w ? w / share : cell);
        return ((w + other) / 2 - share * std::max(w, other)) * (1 + 1e-9);
    }

    template <class Done>
    void visit(Cell& cell, Done& done) {
        for (Item* m = members_.data() + cell.begin; m != members_.data() + cell.begin + cell.size;) {
            if (done(*m)) *m = members_[cell.begin + --cell.size];
            else ++m;
        }
    }

    double share_;
    std::vector<Class> classes_;
    std::vector<Cell> cells_;
    std::vector<Item> members_;
};

template <class Item>
std::uint32_t Near<Item>::class_of(const Shape& s) {
    for (std::uint32_t k = 0; k < classes_.size(); ++k) {
        const Class& c = classes_[k];
        if (s.w < c.width && 4 * s.w >= c.width && s.h < c.height && 4 * s.h >= c.height) return k;
    }
    const auto power_of_4 = [](double v) {
        const int e = std::ilogb(v);
        return e - (e & 1) + 2;
    };
    const int ex = power_of_4(s.w), ey = power_of_4(s.h);
    classes_.push_back({std::ldexp(1, ex), std::ldexp(1, ey), std::ldexp(1, -ex), std::ldexp(1, -ey), s.x, s.y, s.x,
                        s.y, 0, 0, 0, 0, 0, false});
    return static_cast<std::uint32_t>(classes_.size() - 1);
}

template <class Item>
void Near<Item>::lay_out() {
    std::size_t total = 0;
    for (Class& c : classes_) {
        c.columns = step(c.x2 - c.x1, c.per_x) + 1, c.rows = step(c.y2 - c.y1, c.per_y) + 1;
        const double count = static_cast<double>(c.count);
        c.hashed = static_cast<double>(c.columns) * static_cast<double>(c.rows) > 4 * count + 16;
        c.first = total, c.cells = c.hashed ? 1 : static_cast<std::size_t>(c.columns * c.rows);
        while (c.hashed && c.cells < 2 * c.count) c.cells *= 2;
        total += c.cells;
    }
    cells_.assign(total, {0, 0});
}

template <class Item>
Near<Item>::Near(const std::vector<Item>& items, double share) : share_(share) {
    constexpr auto nowhere = static_cast<std::uint32_t>(-1);
    const std::size_t n = items.size();
    std::vector<std::uint32_t> at(n);  // first the class, then the cell
    for (std::size_t i = 0; i < n; ++i) {
        const Shape s(items[i]);
        at[i] = s.w < no_side || s.h < no_side ? nowhere : class_of(s);
        if (at[i] == nowhere) continue;
        Class& c = classes_[at[i]];
        c.x1 = std::min(c.x1, s.x), c.x2 = std::max(c.x2, s.x);
        c.y1 = std::min(c.y1, s.y), c.y2 = std::max(c.y2, s.y);
        ++c.count;
    }
    lay_out();
    for (std::size_t i = 0; i < n; ++i) {
        if (at[i] == nowhere) continue;
        const Shape s(items[i]);
        const Class& c = classes_[at[i]];
        at[i] = static_cast<std::uint32_t>(place(c, step(s.x - c.x1, c.per_x), step(s.y - c.y1, c.per_y)));
        ++cells_[at[i]].size;
    }
    std::uint32_t begin = 0;
    for (Cell& cell : cells_) cell.begin = begin, begin += cell.size, cell.size = 0;
    members_.resize(begin);
    for (std::size_t i = 0; i < n; ++i) {
        if (at[i] == nowhere) continue;
        Cell& cell = cells_[at[i]];
        members_[cell.begin + cell.size++] = items[i];
    }
}

template <class Item>
template <class Done>
void Near<Item>::each(const Item& item, Done done) {
    const Shape s(item);
    if (s.w < no_side || s.h < no_side) return;
    const double round_x = 1e-15 * std::abs(s.x), round_y = 1e-15 * std::abs(s.y);  // centres are rounded
    for (const Class& c : classes_) {
        if (c.width < share_ * s.w || s.w < share_ * c.width / 4 || c.height < share_ * s.h ||
            s.h < share_ * c.height / 4)
            continue;
        const double dx = reach(s.w, c.width, share_) + round_x, dy = reach(s.h, c.height, share_) + round_y;
        if (s.x + dx < c.x1 || s.x - dx > c.x2 || s.y + dy < c.y1 || s.y - dy > c.y2) continue;
        const std::int64_t c0 = step(s.x - dx - c.x1, c.per_x), r0 = step(s.y - dy - c.y1, c.per_y);
        const std::int64_t c1 = std::min(step(s.x + dx - c.x1, c.per_x), c.columns - 1);
        const std::int64_t r1 = std::min(step(s.y + dy - c.y1, c.per_y), c.rows - 1);
        const double asked = static_cast<double>(c1 - c0 + 1) * static_cast<double>(r1 - r0 + 1);
        if (c.hashed && asked > static_cast<double>(c.cells)) {
            for (std::size_t k = 0; k < c.cells; ++k) visit(cells_[c.first + k], done);
            continue;
        }
        for (std::int64_t r = r0; r <= r1; ++r)
            for (std::int64_t k = c0; k <= c1; ++k) visit(cells_[place(c, k, r)], done);
    }
}

}  // namespace cnnbook
