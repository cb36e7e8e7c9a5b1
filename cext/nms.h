// Non-maximum suppression. Nothing here knows of Python: bind.cpp does.
// In all of them a lower score gives way to a higher one; of equal scores the one that came first goes first.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "quads.h"

namespace cnnbook {

// Row numbers by falling score.
std::vector<std::uint32_t> best_first(const double* scores, std::size_t n);

// Rows that no better row overlaps by more than the threshold, best first. T is the type in which IoU is computed.
template <class T>
std::vector<std::uint32_t> nms(const double* boxes, const double* scores, std::size_t n, double threshold);

std::vector<std::uint32_t> quad_nms(const Quad* quads, const double* scores, std::size_t n, double threshold);

// Locality-aware: runs of rows that overlap are merged in their order, then NMS. Scores are weights >= 0.
void lanms(std::vector<Quad>& quads, std::vector<double>& scores, double threshold);

}  // namespace cnnbook
