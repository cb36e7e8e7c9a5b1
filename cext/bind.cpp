// The only file that knows both Python and C++: it checks what comes in, copies it, and hands plain pointers to the
// geometry.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "boxes.h"

namespace py = pybind11;

namespace {

std::string text(const py::object& x) { return py::str(x); }

// The boxes as doubles in one row after the other, or the error that the Python version gives.
// The copy is small beside the result, it takes every layout and byte order, and no other thread can change it.
std::vector<double> boxes_of(const py::array& x, const std::string& name) {
    const char kind = x.dtype().kind();
    if (kind != 'f' && kind != 'i' && kind != 'u')
        throw py::type_error(name + ": expected an array of int or float, got " + text(x.dtype()));
    if (x.ndim() != 2 || x.shape(1) != 4)
        throw py::value_error(name + ": expected shape (N, 4), got " + text(x.attr("shape")));
    const py::array_t<double, py::array::c_style | py::array::forcecast> plain(x);
    std::vector<double> boxes(plain.data(), plain.data() + plain.size());

    const auto bad = cnnbook::first_bad_box(boxes.data(), boxes.size() / 4);
    const double* p = boxes.data() + 4 * bad.row;
    const std::string row = " in row " + std::to_string(bad.row);
    if (bad.fault == cnnbook::Fault::coordinate)
        throw py::value_error(name + ": expected finite coordinates up to 1e150, got " +
                              text(py::float_(p[bad.column])) + row);
    if (bad.fault == cnnbook::Fault::order)
        throw py::value_error(name + ": expected x1 <= x2 and y1 <= y2, got " +
                              text(py::make_tuple(p[0], p[1], p[2], p[3])) + row);
    return boxes;
}

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
    const auto single = [](const py::array& x) { return x.dtype().kind() == 'f' && x.itemsize() <= 4; };
    return single(a) && single(b) ? fill<float>(boxes_a, boxes_b) : fill<double>(boxes_a, boxes_b);
}

}  // namespace

PYBIND11_MODULE(_cext, m) {
    m.doc() = "The C++ part of cnnbook; use it through cnnbook.boxes.";
    m.def("box_iou", &box_iou, py::arg("a"), py::arg("b"),
          "Intersection over union of boxes a (N, 4) and b (M, 4), x1 y1 x2 y2: an array (N, M).");
}
