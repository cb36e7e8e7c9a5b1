#include "quads.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "boxes.h"

namespace cnnbook {

namespace {

constexpr double flat = 1e-9;    // an area below this share of the squared diagonal is none
constexpr double tiny = 1e-260;  // twice an area below this: its digits are lost, so it is none
constexpr double dent = -1e-6;   // a corner may point in by this share of the area: rounding, not shape

double cross(Point a, Point b) { return a.x * b.y - a.y * b.x; }
Point minus(Point a, Point b) { return {a.x - b.x, a.y - b.y}; }

double twice_area(const Point* p, int n) {
    double sum = 0;
    for (int i = 1; i + 1 < n; ++i) sum += cross(minus(p[i], p[0]), minus(p[i + 1], p[0]));
    return sum;
}

// Area of what a and b have in common: a is cut along each edge of b (Sutherland and Hodgman 1974). A cut of n corners
// leaves at most n + n / 2, whatever rounding does to their sides: 4, 6, 9, 13, 19.
double common_area(const Quad& a, const Quad& b) {
    Point one[20], two[20], *in = one, *out = two;
    const Point origin = b.p[0];  // near the origin no digit is lost
    for (int i = 0; i < 4; ++i) in[i] = minus(a.p[i], origin);
    int n = 4;
    for (int e = 0; e < 4; ++e) {
        const Point from = minus(b.p[e], origin), along = minus(minus(b.p[(e + 1) % 4], origin), from);
        double side[20];
        int inside = 0;
        for (int i = 0; i < n; ++i) {
            side[i] = cross(along, minus(in[i], from));  // >= 0: on the inner side of this edge
            inside += side[i] >= 0;
        }
        if (inside == n) continue;
        if (inside == 0) return 0;
        int k = 0;
        for (int i = 0, j = n - 1; i < n; j = i++) {
            if ((side[j] >= 0) != (side[i] >= 0)) {
                const double t = side[j] / (side[j] - side[i]);
                out[k++] = {in[j].x + t * (in[i].x - in[j].x), in[j].y + t * (in[i].y - in[j].y)};
            }
            if (side[i] >= 0) out[k++] = in[i];
        }
        std::swap(in, out);
        n = k;
    }
    return std::max(0.0, twice_area(in, n) / 2);
}

}  // namespace

double area(const Quad& quad) { return twice_area(quad.p, 4) / 2; }

Bounds bounds(const Quad& q) {
    const auto [x1, x2] = std::minmax({q.p[0].x, q.p[1].x, q.p[2].x, q.p[3].x});
    const auto [y1, y2] = std::minmax({q.p[0].y, q.p[1].y, q.p[2].y, q.p[3].y});
    return {x1, y1, x2, y2};
}

QuadFault arrange(Quad& quad) {
    // Four points have three orders that are not the same ring turned or reversed.
    static constexpr int orders[3][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 1, 3, 2}};
    const Bounds box = bounds(quad);
    const double w = box.x2 - box.x1, h = box.y2 - box.y1, least = std::max(flat * (w * w + h * h), tiny);
    QuadFault fault = QuadFault::area;
    for (const auto& order : orders) {
        Quad q{{quad.p[order[0]], quad.p[order[1]], quad.p[order[2]], quad.p[order[3]]}};
        double twice = twice_area(q.p, 4);
        if (twice < 0) std::swap(q.p[1], q.p[3]), twice = twice_area(q.p, 4);
        if (!(twice > least)) continue;
        fault = QuadFault::convex;
        Point edge[4];
        for (int i = 0; i < 4; ++i) edge[i] = minus(q.p[(i + 1) % 4], q.p[i]);
        const double sharpest = std::min({cross(edge[0], edge[1]), cross(edge[1], edge[2]), cross(edge[2], edge[3]),
                                          cross(edge[3], edge[0])});
        if (sharpest < dent * twice) continue;
        quad = q;
        return QuadFault::none;
    }
    return fault;
}

BadQuad arrange(Quad* quads, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        const double* values = &quads[i].p[0].x;
        for (int k = 0; k < 8; ++k)
            if (!(std::abs(values[k]) <= coordinate_limit)) return {i, k, QuadFault::coordinate};
        const QuadFault fault = arrange(quads[i]);
        if (fault != QuadFault::none) return {i, 0, fault};
    }
    return {n, 0, QuadFault::none};
}

double iou(const Quad& a, double area_a, const Quad& b, double area_b) {
    const double common = std::min(common_area(a, b), std::min(area_a, area_b));
    return common / (area_a + area_b - common);
}

void quad_iou(const Quad* a, std::size_t n, const Quad* b, std::size_t m, double* out) {
    std::vector<Bounds> box(m);
    std::vector<double> size(m);
    for (std::size_t j = 0; j < m; ++j) box[j] = bounds(b[j]), size[j] = area(b[j]);
    for (std::size_t i = 0; i < n; ++i) {
        const Bounds p = bounds(a[i]);
        const double area_a = area(a[i]);
        for (std::size_t j = 0; j < m; ++j) {
            const Bounds& q = box[j];
            const bool apart = p.x2 <= q.x1 || q.x2 <= p.x1 || p.y2 <= q.y1 || q.y2 <= p.y1;  // most pairs are
            out[i * m + j] = apart ? 0 : iou(a[i], area_a, b[j], size[j]);
        }
    }
}

}  // namespace cnnbook
