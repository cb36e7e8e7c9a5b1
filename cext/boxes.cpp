#include "boxes.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace cnnbook {

BadBox first_bad_box(const double* boxes, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        const double* p = boxes + 4 * i;
        for (int k = 0; k < 4; ++k)
            if (!(std::abs(p[k]) <= coordinate_limit)) return {i, k, Fault::coordinate};  // so, NaN is caught
        if (p[2] < p[0] || p[3] < p[1]) return {i, 0, Fault::order};
    }
    return {n, 0, Fault::none};
}

bool fits_float(const double* boxes, std::size_t n) {
    const auto too_thin = [](double side) { return side > 0 && side < 1e-15; };
    for (std::size_t i = 0; i < n; ++i) {
        const double* p = boxes + 4 * i;
        if (!(std::max({-p[0], -p[1], p[2], p[3]}) <= 1e18)) return false;
        if (too_thin(p[2] - p[0]) || too_thin(p[3] - p[1])) return false;
    }
    return true;
}

namespace {

// One array for each coordinate: the inner loop below then reads neighbours, and a compiler can take several boxes at
// a time (GCC needs -fno-trapping-math for that; the results are the same bits).
struct Columns {
    std::vector<double> x1, y1, x2, y2, area;

    Columns(const double* boxes, std::size_t n) : x1(n), y1(n), x2(n), y2(n), area(n) {
        for (std::size_t i = 0; i < n; ++i) {
            const double* p = boxes + 4 * i;
            x1[i] = p[0], y1[i] = p[1], x2[i] = p[2], y2[i] = p[3];
            area[i] = (p[2] - p[0]) * (p[3] - p[1]);
        }
    }
};

}  // namespace

template <class T>
void box_iou(const double* a, std::size_t n, const double* b, std::size_t m, T* out) {
    const Columns q(b, m);
    const double *x1 = q.x1.data(), *y1 = q.y1.data(), *x2 = q.x2.data(), *y2 = q.y2.data(), *area = q.area.data();
    for (std::size_t i = 0; i < n; ++i) {
        const double p0 = a[4 * i], p1 = a[4 * i + 1], p2 = a[4 * i + 2], p3 = a[4 * i + 3];
        const double area_a = (p2 - p0) * (p3 - p1);
        T* row = out + i * m;
        for (std::size_t j = 0; j < m; ++j) {
            const double w = std::max(0.0, std::min(p2, x2[j]) - std::max(p0, x1[j]));
            const double h = std::max(0.0, std::min(p3, y2[j]) - std::max(p1, y1[j]));
            const double inter = w * h;
            const double both = area_a + area[j] - inter;
            row[j] = static_cast<T>(inter / (both > 0 ? both : 1.0));  // never 0 / 0
        }
    }
}

template void box_iou(const double*, std::size_t, const double*, std::size_t, float*);
template void box_iou(const double*, std::size_t, const double*, std::size_t, double*);

}  // namespace cnnbook
