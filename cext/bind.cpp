// The only file that knows both Python and C++: it checks what comes in, copies it, and hands plain pointers to the
// geometry.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "boxes.h"
#include "nms.h"
#include "quads.h"

namespace py = pybind11;

namespace {

std::string text(const py::object& x) { return py::str(x); }

std::string in_row(std::size_t row) { return " in row " + std::to_string(row); }

// The numbers as doubles in one row after the other, or the error that the Python version gives.
// The copy is small beside the work, it takes every layout and byte order, and no other thread can change it.
std::vector<double> doubles_of(const py::array& x, const std::string& name, const char* shape, bool fits) {
    const char kind = x.dtype().kind();
    if (kind != 'f' && kind != 'i' && kind != 'u')
        throw py::type_error(name + ": expected an array of int or float, got " + text(x.dtype()));
    if (!fits) throw py::value_error(name + ": expected shape " + shape + ", got " + text(x.attr("shape")));
    const py::array_t<double, py::array::c_style | py::array::forcecast> plain(x);
    return std::vector<double>(plain.data(), plain.data() + plain.size());
}

[[noreturn]] void refuse_coordinate(const std::string& name, double value, std::size_t row) {
    throw py::value_error(name + ": expected finite coordinates up to 1e150, got " + text(py::float_(value)) +
                          in_row(row));
}

std::vector<double> boxes_of(const py::array& x, const std::string& name) {
    auto boxes = doubles_of(x, name, "(N, 4)", x.ndim() == 2 && x.shape(1) == 4);
    const auto bad = cnnbook::first_bad_box(boxes.data(), boxes.size() / 4);
    const double* p = boxes.data() + 4 * bad.row;
    if (bad.fault == cnnbook::Fault::coordinate) refuse_coordinate(name, p[bad.column], bad.row);
    if (bad.fault == cnnbook::Fault::order)
        throw py::value_error(name + ": expected x1 <= x2 and y1 <= y2, got " +
                              text(py::make_tuple(p[0], p[1], p[2], p[3])) + in_row(bad.row));
    return boxes;
}

std::vector<cnnbook::Quad> quads_of(const py::array& x, const std::string& name) {
    using cnnbook::QuadFault;
    const bool fits = x.ndim() == 3 && x.shape(1) == 4 && x.shape(2) == 2;
    const auto values = doubles_of(x, name, "(N, 4, 2)", fits);
    static_assert(sizeof(cnnbook::Quad) == 8 * sizeof(double), "a quad is eight doubles");
    std::vector<cnnbook::Quad> quads(values.size() / 8);
    if (!quads.empty()) std::memcpy(quads.data(), values.data(), values.size() * sizeof(double));
    const auto bad = cnnbook::arrange(quads.data(), quads.size());
    if (bad.fault == QuadFault::none) return quads;
    const double* p = values.data() + 8 * bad.row;
    if (bad.fault == QuadFault::coordinate) refuse_coordinate(name, p[bad.column], bad.row);
    const auto point = [p](int i) { return py::make_tuple(p[2 * i], p[2 * i + 1]); };
    throw py::value_error(name + (bad.fault == QuadFault::area ? ": expected corners around an area, got "
                                                               : ": expected a convex quad, got ") +
                          text(py::make_tuple(point(0), point(1), point(2), point(3))) + in_row(bad.row));
}

// Scores may be any finite numbers; as weights they must be 0 or more.
std::vector<double> scores_of(const py::array& x, std::size_t n, bool weights) {
    const std::string shape = "(" + std::to_string(n) + ",)";
    auto scores = doubles_of(x, "scores", shape.c_str(), x.ndim() == 1 && x.shape(0) == static_cast<py::ssize_t>(n));
    for (std::size_t i = 0; i < n; ++i) {
        if (weights ? scores[i] >= 0 && scores[i] <= cnnbook::coordinate_limit : std::isfinite(scores[i])) continue;
        throw py::value_error(std::string("scores: expected ") +
                              (weights ? "numbers from 0 to 1e150" : "finite numbers") + ", got " +
                              text(py::float_(scores[i])) + in_row(i));
    }
    return scores;
}

void check_threshold(double threshold) {
    if (!(threshold >= 0 && threshold <= 1))
        throw py::value_error("iou_threshold: expected a number from 0 to 1, got " + text(py::float_(threshold)));
}

bool is_single(const py::array& x) { return x.dtype().kind() == 'f' && x.itemsize() <= 4; }

template <class T>
py::array fill(const std::vector<double>& a, const std::vector<double>& b) {
    const std::size_t n = a.size() / 4, m = b.size() / 4;
    py::array_t<T> result(std::vector<std::size_t>{n, m});
    T* out = result.mutable_data();
    {
        py::gil_scoped_release other_threads_may_run;  // from here to the brace: no Python object is touched
        cnnbook::box_iou(a.data(), n, b.data(), m, out);
    }
    return result;
}

py::array box_iou(const py::array& a, const py::array& b) {
    const auto boxes_a = boxes_of(a, "a"), boxes_b = boxes_of(b, "b");
    return is_single(a) && is_single(b) ? fill<float>(boxes_a, boxes_b) : fill<double>(boxes_a, boxes_b);
}

py::array quad_iou(const py::array& a, const py::array& b) {
    const auto quads_a = quads_of(a, "a"), quads_b = quads_of(b, "b");
    py::array_t<double> result(std::vector<std::size_t>{quads_a.size(), quads_b.size()});
    double* out = result.mutable_data();
    {
        py::gil_scoped_release other_threads_may_run;
        cnnbook::quad_iou(quads_a.data(), quads_a.size(), quads_b.data(), quads_b.size(), out);
    }
    return result;
}

py::array rows(const std::vector<std::uint32_t>& kept) {
    py::array_t<std::int64_t> result(static_cast<py::ssize_t>(kept.size()));
    std::copy(kept.begin(), kept.end(), result.mutable_data());
    return result;
}

py::array nms(const py::array& b, const py::array& s, double threshold) {
    const auto boxes = boxes_of(b, "boxes");
    const auto scores = scores_of(s, boxes.size() / 4, false);
    check_threshold(threshold);
    const bool single = is_single(b);
    std::vector<std::uint32_t> kept;
    {
        py::gil_scoped_release other_threads_may_run;
        const bool fits = single && cnnbook::fits_float(boxes.data(), scores.size());
        kept = (fits ? cnnbook::nms<float> : cnnbook::nms<double>)(boxes.data(), scores.data(), scores.size(),
                                                                   threshold);
    }
    return rows(kept);
}

py::array quad_nms(const py::array& q, const py::array& s, double threshold) {
    const auto quads = quads_of(q, "quads");
    const auto scores = scores_of(s, quads.size(), false);
    check_threshold(threshold);
    std::vector<std::uint32_t> kept;
    {
        py::gil_scoped_release other_threads_may_run;
        kept = cnnbook::quad_nms(quads.data(), scores.data(), quads.size(), threshold);
    }
    return rows(kept);
}

py::tuple lanms(const py::array& q, const py::array& s, double threshold) {
    auto quads = quads_of(q, "quads");
    auto scores = scores_of(s, quads.size(), true);
    check_threshold(threshold);
    {
        py::gil_scoped_release other_threads_may_run;
        cnnbook::lanms(quads, scores, threshold);
    }
    const std::size_t n = quads.size();
    py::array_t<double> quads_out(std::vector<std::size_t>{n, 4, 2}), scores_out(static_cast<py::ssize_t>(n));
    if (n) std::memcpy(quads_out.mutable_data(), quads.data(), n * sizeof(cnnbook::Quad));
    std::copy(scores.begin(), scores.end(), scores_out.mutable_data());
    return py::make_tuple(quads_out, scores_out);
}

}  // namespace

PYBIND11_MODULE(_cext, m) {
    m.doc() = "The C++ part of cnnbook; use it through cnnbook.boxes.";
    m.def("box_iou", &box_iou, py::arg("a"), py::arg("b"),
          "Intersection over union of boxes a (N, 4) and b (M, 4), x1 y1 x2 y2: an array (N, M).");
    m.def("quad_iou", &quad_iou, py::arg("a"), py::arg("b"),
          "Intersection over union of convex quads a (N, 4, 2) and b (M, 4, 2): an array (N, M) of float64.");
    m.def("nms", &nms, py::arg("boxes"), py::arg("scores"), py::arg("iou_threshold"),
          "Rows of boxes (N, 4) that no better row overlaps by more than the threshold, best first.");
    m.def("quad_nms", &quad_nms, py::arg("quads"), py::arg("scores"), py::arg("iou_threshold"),
          "Rows of quads (N, 4, 2) that no better row overlaps by more than the threshold, best first.");
    m.def("lanms", &lanms, py::arg("quads"), py::arg("scores"), py::arg("iou_threshold"),
          "Runs of overlapping quads merged, then NMS: quads (K, 4, 2) and their summed scores (K,), best first.");
}
