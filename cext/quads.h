// Geometry of convex quads. Nothing here knows of Python: bind.cpp does.
#pragma once
#include <cstddef>

namespace cnnbook {

struct Point {
    double x, y;  // pixels, x to the right and y downwards
};

// Four corners of a convex shape in clockwise order, as seen on a screen. Eight doubles, one behind the other.
struct Quad {
    Point p[4];
};

struct Bounds {
    double x1, y1, x2, y2;
};

enum class QuadFault { none, coordinate, area, convex };  // what is wrong with a quad

// The first quad that is none, and why: a coordinate that is NaN or beyond the limit, no area, a corner that points in.
struct BadQuad {
    std::size_t row;
    int column;  // of the bad coordinate, 0 to 7
    QuadFault fault;
};

// Puts one quad's corners in clockwise order; the first corner stays the first.
QuadFault arrange(Quad& quad);

// Puts every quad's corners in clockwise order, up to the first bad one, which stays as it was.
BadQuad arrange(Quad* quads, std::size_t n);

double area(const Quad& quad);
Bounds bounds(const Quad& quad);

// Intersection over union of two arranged quads with these areas, computed in double.
double iou(const Quad& a, double area_a, const Quad& b, double area_b);

// out[i * m + j] = iou(a_i, b_j)
void quad_iou(const Quad* a, std::size_t n, const Quad* b, std::size_t m, double* out);

}  // namespace cnnbook
