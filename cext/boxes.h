// Geometry of axis-aligned boxes. Nothing here knows of Python: bind.cpp does.
#pragma once
#include <cstddef>

namespace cnnbook {

// A box is four doubles x1, y1, x2, y2 in pixels, x to the right and y downwards; boxes lie one behind the other.

// Beyond this an area or a sum of areas may no longer be a finite double.
constexpr double coordinate_limit = 1e150;

enum class Fault { none, coordinate, order };  // what is wrong with a box

// The first box that is not one, and why: a coordinate that is NaN or beyond the limit, or corners out of order.
struct BadBox {
    std::size_t row;
    int column;  // of the bad coordinate
    Fault fault;
};

BadBox first_bad_box(const double* boxes, std::size_t n);

// out[i * m + j] = area(a_i and b_j) / area(a_i or b_j), computed in double; 0 where both areas are 0.
// The boxes must be good ones. T is float or double.
template <class T>
void box_iou(const double* a, std::size_t n, const double* b, std::size_t m, T* out);

// Whether areas of these boxes can be computed in float: none overflows, none is lost.
bool fits_float(const double* boxes, std::size_t n);

}  // namespace cnnbook
