#include "nms.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "near.h"

namespace cnnbook {

std::vector<std::uint32_t> best_first(const double* scores, std::size_t n) {
    // A radix sort, byte by byte from the lowest: equal keys stay in their order.
    struct Item {
        std::uint64_t key;
        std::uint32_t row;
    };
    std::vector<Item> items(n), other(n);
    std::vector<std::array<std::uint32_t, 256>> counts(8);
    for (std::size_t i = 0; i < n; ++i) {
        const double score = scores[i] + 0.0;  // -0 becomes 0
        std::uint64_t bits;
        std::memcpy(&bits, &score, sizeof bits);
        const std::uint64_t sign = bits >> 63;  // larger numbers must have smaller keys
        items[i] = {sign ? bits : ~bits & 0x7fffffffffffffffu, static_cast<std::uint32_t>(i)};
        for (std::size_t b = 0; b < 8; ++b) ++counts[b][items[i].key >> (8 * b) & 255];
    }
    for (std::size_t b = 0; b < 8 && n; ++b) {
        if (counts[b][items[0].key >> (8 * b) & 255] == n) continue;  // all the same here
        std::uint32_t begin = 0;
        for (auto& count : counts[b]) begin += count, count = begin - count;
        for (const Item& item : items) other[counts[b][item.key >> (8 * b) & 255]++] = item;
        std::swap(items, other);
    }
    std::vector<std::uint32_t> order(n);
    for (std::size_t i = 0; i < n; ++i) order[i] = items[i].row;
    return order;
}

namespace {

constexpr double slack = 1e-5;  // more than IoU errs by, also in float

// The greedy loop over items that stand best first: ranks of those that stay. exceeds(p, q) is the exact question.
template <class Item, class Exceeds>
std::vector<std::uint32_t> greedy(const std::vector<Item>& items, double share, Exceeds exceeds) {
    Near<Item> near(items, share);
    std::vector<char> gone(items.size(), 0);
    std::vector<std::uint32_t> kept;
    for (const Item& p : items) {
        if (gone[p.rank]) continue;
        kept.push_back(p.rank);
        near.each(p, [&](const Item& q) {
            if (q.rank <= p.rank) return true;  // its turn is over
            if (exceeds(p, q)) gone[q.rank] = 1;
            return gone[q.rank] != 0;
        });
    }
    return kept;
}

std::vector<std::uint32_t> rows_of(const std::vector<std::uint32_t>& order, std::vector<std::uint32_t> kept) {
    for (auto& k : kept) k = order[k];
    return kept;
}

template <class T>
struct Item {
    T x1, y1, x2, y2, area;
    std::uint32_t rank;
};

}  // namespace

template <class T>
std::vector<std::uint32_t> nms(const double* boxes, const double* scores, std::size_t n, double threshold) {
    const auto order = best_first(scores, n);
    std::vector<Item<T>> items(n);
    for (std::size_t i = 0; i < n; ++i) {
        const double* p = boxes + 4 * std::size_t{order[i]};
        const T x1 = static_cast<T>(p[0]), y1 = static_cast<T>(p[1]);
        const T x2 = static_cast<T>(p[2]), y2 = static_cast<T>(p[3]);
        items[i] = {x1, y1, x2, y2, (x2 - x1) * (y2 - y1), static_cast<std::uint32_t>(i)};
    }
    // IoU is at most w / W if w is the smaller width and W the larger one, so more than that must be shared.
    const double share = std::max(0.0, threshold - slack);
    return rows_of(order, greedy(items, share, [threshold](const Item<T>& p, const Item<T>& q) {
        const T w = std::min(p.x2, q.x2) - std::max(p.x1, q.x1);
        const T h = std::min(p.y2, q.y2) - std::max(p.y1, q.y1);
        if (!(w > 0 && h > 0)) return false;
        const T inter = w * h;
        return static_cast<double>(inter / (p.area + q.area - inter)) > threshold;
    }));
}

template std::vector<std::uint32_t> nms<float>(const double*, const double*, std::size_t, double);
template std::vector<std::uint32_t> nms<double>(const double*, const double*, std::size_t, double);

std::vector<std::uint32_t> quad_nms(const Quad* quads, const double* scores, std::size_t n, double threshold) {
    const auto order = best_first(scores, n);
    std::vector<Item<double>> items(n);
    for (std::size_t i = 0; i < n; ++i) {
        const Bounds b = bounds(quads[order[i]]);
        items[i] = {b.x1, b.y1, b.x2, b.y2, area(quads[order[i]]), static_cast<std::uint32_t>(i)};
    }
    // Of a convex shape of width W, a strip of width s W holds at most 1 - (1 - s)^2 of the area (a rhombus has so much
    // in its middle). So IoU > t asks for s > 1 - sqrt(1 - t).
    const double sure = std::max(0.0, threshold - slack), share = 1 - std::sqrt(1 - sure);
    return rows_of(order, greedy(items, share, [&](const Item<double>& p, const Item<double>& q) {
        const double w = std::min(p.x2, q.x2) - std::max(p.x1, q.x1);
        const double h = std::min(p.y2, q.y2) - std::max(p.y1, q.y1);
        if (!(w > 0 && h > 0)) return false;
        const double needed = sure * std::max(p.area, q.area);
        if (w * h < needed || std::min(p.area, q.area) < needed) return false;
        return iou(quads[order[p.rank]], p.area, quads[order[q.rank]], q.area) > threshold;
    }));
}

namespace {

// The number of corners by which q must be turned so that its corners lie nearest to p's.
int best_turn(const Quad& p, const Quad& q) {
    int best = 0;
    double least = 0;
    for (int turn = 0; turn < 4; ++turn) {
        double sum = 0;
        for (int i = 0; i < 4; ++i) {
            const double dx = q.p[(i + turn) % 4].x - p.p[i].x, dy = q.p[(i + turn) % 4].y - p.p[i].y;
            sum += dx * dx + dy * dy;
        }
        if (turn == 0 || sum < least) best = turn, least = sum;
    }
    return best;
}

double around(const Quad& q) {  // at least the length of its outline
    double sum = 0;
    for (int i = 0; i < 4; ++i)
        sum += std::abs(q.p[(i + 1) % 4].x - q.p[i].x) + std::abs(q.p[(i + 1) % 4].y - q.p[i].y);
    return sum;
}

struct Run {  // rows merged so far
    Quad quad;
    double score, size, length;
    Bounds box;

    Run(const Quad& q, double s) : quad(q), score(s), size(area(q)), length(around(q)), box(bounds(q)) {}

    bool merge(const Run& next, double threshold);
};

bool Run::merge(const Run& next, double threshold) {
    const Bounds& q = next.box;
    if (box.x2 <= q.x1 || q.x2 <= box.x1 || box.y2 <= q.y1 || q.y2 <= box.y1) return false;
    const int turn = best_turn(quad, next.quad);
    // When no corner moves by more than d, the outline sweeps at most d times its length. IoU is (S - D) / (S + D) with
    // S both areas and D what only one of them covers. If that settles it, nothing has to be cut.
    double moved = 0;
    for (int i = 0; i < 4; ++i) {
        const Point a = quad.p[i], b = next.quad.p[(i + turn) % 4];
        moved = std::max(moved, std::abs(b.x - a.x) + std::abs(b.y - a.y));
    }
    const bool sure = moved * (length + next.length) / 2 * (1 + threshold + slack) <
                      (size + next.size) * (1 - threshold - slack);
    if (!sure && !(iou(quad, size, next.quad, next.size) > threshold)) return false;
    const double sum = score + next.score, weight = sum > 0 ? next.score / sum : 0.5;
    Quad mean;
    for (int i = 0; i < 4; ++i) {
        const Point a = quad.p[i], b = next.quad.p[(i + turn) % 4];
        mean.p[i] = {a.x + (b.x - a.x) * weight, a.y + (b.y - a.y) * weight};
    }
    Quad arranged = mean;
    if (arrange(arranged) != QuadFault::none || std::memcmp(&arranged, &mean, sizeof mean) != 0) return false;
    *this = Run(mean, sum);
    return true;
}

}  // namespace

void lanms(std::vector<Quad>& quads, std::vector<double>& scores, double threshold) {
    std::vector<Quad> merged;
    std::vector<double> weights;
    const auto put = [&](const Run& run) { merged.push_back(run.quad), weights.push_back(run.score); };
    if (!quads.empty()) {
        Run run(quads[0], scores[0]);
        for (std::size_t i = 1; i < quads.size(); ++i) {
            const Run next(quads[i], scores[i]);
            if (run.merge(next, threshold)) continue;
            put(run);
            run = next;
        }
        put(run);
    }
    const auto kept = quad_nms(merged.data(), weights.data(), merged.size(), threshold);
    quads.clear(), scores.clear();
    for (const auto k : kept) quads.push_back(merged[k]), scores.push_back(weights[k]);
}

}  // namespace cnnbook
