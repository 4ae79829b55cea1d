#include "frozen.h"

#include <cstring>

#include "../pybind.h"
#include "tensors.h"

namespace fused_rnn::ops {
namespace py = pybind11;
namespace {

constexpr int64_t kNone = -1;

// How often a tensor was written to, by its own counter; kNone where it has none.
int64_t version_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const Owned answer{PyObject_GetAttr(tensor, name)};
  const int64_t version = answer.object ? PyLong_AsLongLong(answer.object) : kNone;
  if (!PyErr_Occurred()) return version;
  PyErr_Clear();
  return kNone;
}

// Whether a weak reference is to this object.
bool refers_to(PyObject* reference, PyObject* object) {
#if PY_VERSION_HEX >= 0x030D0000
  Owned now;
  return PyWeakref_GetRef(reference, &now.object) == 1 && now.object == object;
#else
  return PyWeakref_GetObject(reference) == object;
#endif
}

bool same_memory(const dlpack::Tensor& a, const dlpack::Tensor& b, const int64_t* shape, const int64_t* strides) {
  if (static_cast<char*>(a.data) + a.byte_offset != b.data || a.ndim != b.ndim || a.code != b.code || a.bits != b.bits ||
      a.device_type != b.device_type)
    return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != shape[i] || (a.strides && shape[i] != 1 && a.strides[i] != strides[i])) return false;
  return true;
}

}  // namespace

Frozen::Frozen(std::string cell, std::vector<std::string> names, int64_t layers, int64_t directions, Narrow narrow)
    : cell_(std::move(cell)), names_(std::move(names)), layers_(layers), directions_(directions), narrow_(narrow) {
  cell_of(cell_);
  if (layers < 1 || directions < 1 || directions > 2 || names_.empty() || int64_t(names_.size()) % (layers * directions))
    throw py::value_error("names: expected as many of every direction, one or two, of every layer");
  keys_ = std::vector<Owned>(names_.size());
  scales_ = std::vector<Owned>(names_.size());
  for (size_t i = 0; i < names_.size(); ++i) {
    keys_[i].object = PyUnicode_InternFromString(names_[i].c_str());
    scales_[i].object = PyUnicode_InternFromString((names_[i] + "_scale").c_str());
  }
}

std::shared_ptr<const Packed> Frozen::of(PyObject* tensors) {
  std::shared_ptr<const Kept> kept = kept_;
  if (!kept || !same(*kept, tensors)) {
    kept = pack(tensors);
    std::shared_ptr<const Kept> before = kept;
    kept_.swap(before);  // whole, before anything ends: where a tensor does, other threads may run
  }
  PyErr_Clear();
  if (!kept) return nullptr;
  return {kept, &kept->packed};
}

bool Frozen::same(const Kept& kept, PyObject* tensors) const {
  size_t at = 0;
  const auto is = [&](PyObject* key) {
    const Stamp& stamp = kept.stamps[at++];
    PyObject* const object = PyDict_GetItemWithError(tensors, key);
    dlpack::Tensor now;
    return object && refers_to(stamp.reference.object, object) && exchange->tensor_from_object(object, &now) == 0 &&
           same_memory(now, stamp.tensor, stamp.shape, stamp.strides) && version_of(object) == stamp.version;
  };
  for (size_t i = 0; i < keys_.size(); ++i) {
    const bool scaled = kept.stamps[at].tensor.code == dlpack::kInt;
    if (!is(keys_[i].object) || (scaled && !is(scales_[i].object))) return false;
  }
  return true;
}

std::shared_ptr<const Frozen::Kept> Frozen::pack(PyObject* tensors) const {
  static PyObject* const detach = PyUnicode_InternFromString("detach");
  const CellDescriptor* const cell = cell_of(cell_);
  const int G = cell->gates, sides = cell->recurrent ? 2 : 1;
  const size_t each = names_.size() / size_t(layers_ * directions_), own = size_t(cell->matrices + cell->params);
  if (!exchange || each < own + size_t(sides)) return nullptr;
  const size_t matrices = each - own;  // and biases
  const bool bias = matrices >= size_t(2 * sides), projects = matrices > size_t((bias ? 2 : 1) * sides);

  std::vector<Stamp> stamps;
  std::vector<Owned> held;  // while they are read
  std::vector<std::unique_ptr<float[]>> widened;
  bool narrow = false;
  // The tensor of this name, with its stamp: of the version before it is read.
  const auto take = [&](PyObject* key, int dims, int64_t s0, int64_t s1, dlpack::Tensor& t) {
    PyObject* const object = PyDict_GetItemWithError(tensors, key);
    if (!object) return false;
    Py_INCREF(object);
    held.push_back({object});
    const int64_t version = version_of(object);
    Owned alias{PyObject_CallMethodNoArgs(object, detach)};  // before its address is read: other threads may run meanwhile
    if (version == kNone || !alias.object || !(read(object, t, dims, s0, s1) || (dims == 2 && read_bytes(object, t, s0, s1)))) return false;
    dlpack::Tensor held_there;
    if (exchange->tensor_from_object(alias.object, &held_there) != 0 ||
        static_cast<char*>(held_there.data) + held_there.byte_offset != t.data)
      return false;
    Stamp stamp{{PyWeakref_NewRef(object, nullptr)}, std::move(alias), t, {}, {}, version};
    if (!stamp.reference.object) return false;
    int64_t stride = 1;
    for (int i = dims - 1; i >= 0; --i, stride *= t.shape[i + 1]) stamp.shape[i] = t.shape[i], stamp.strides[i] = stride;
    stamps.push_back(std::move(stamp));
    return true;
  };
  dlpack::Tensor first{};
  // Its address, of int8 that of what it stands for; 0 where it does not fit.
  const auto address = [&](size_t i, int dims, int64_t s0, int64_t s1 = 0) -> uintptr_t {
    dlpack::Tensor t, scale;
    if (!take(keys_[i].object, dims, s0, s1, t)) return 0;
    const int64_t rows = t.shape[0], columns = dims == 2 ? t.shape[1] : 1;
    if (t.code == dlpack::kInt) {
      if (!take(scales_[i].object, 1, rows, 0, scale) || scale.code != dlpack::kFloat || scale.bits != 32) return 0;
      narrow = true;
      widened.emplace_back(new float[size_t(rows * columns)]);
      float* const to = widened.back().get();
      const auto* const from = static_cast<const int8_t*>(t.data);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; ++k) to[r * columns + k] = float(from[r * columns + k]) * static_cast<const float*>(scale.data)[r];
      t = scale, t.data = to;
    }
    if (!first.data) first = t;
    if (t.code != first.code || t.bits != first.bits) return 0;
    return reinterpret_cast<uintptr_t>(t.data);
  };
  stamps.reserve(2 * names_.size());
  Problem p{cell, Dtype::f32, 1, 1, 0, 0, 0, directions_, 0, 1, nullptr, nullptr, nullptr, 1};
  std::vector<WeightAddresses> recurrences;
  for (size_t i = 0; i < names_.size(); i += each) {
    const bool upper = int64_t(i / each) >= directions_;
    WeightAddresses w(5 + own);
    const size_t before = stamps.size();
    size_t next = i;
    w[0] = address(next++, 2, i ? G * p.H : -1, upper ? directions_ * p.P : i ? p.D : -1);
    if (!w[0]) return nullptr;
    if (i == 0) p.D = stamps[before].shape[1], p.H = stamps[before].shape[0] / G;
    if (p.H < 1 || stamps[before].shape[0] != G * p.H || p.H % cell->diagonal) return nullptr;
    const size_t behind = stamps.size();
    if (cell->recurrent && !(w[1] = address(next++, 2, G * p.H, i ? p.P / cell->diagonal : -1))) return nullptr;
    if (i == 0) p.P = cell->recurrent ? stamps[behind].shape[1] * cell->diagonal : p.H;
    if (!projects && p.P != p.H) return nullptr;
    for (int side = 0; bias && side < sides; ++side)
      if (!(w[size_t(2 + side)] = address(next++, 1, G * p.H))) return nullptr;
    if (projects && !(w[4] = address(next++, 2, p.P, p.H))) return nullptr;
    for (int k = 0; k < cell->matrices; ++k)
      if (!(w[size_t(5 + k)] = address(next++, 2, cell->blocks_of[k] * p.H, p.H))) return nullptr;
    for (int k = 0; k < cell->params; ++k)
      if (!(w[size_t(5 + cell->matrices + k)] = address(next++, 1, p.H))) return nullptr;
    recurrences.push_back(std::move(w));
  }
  if (!dtype_of(first, p.dtype) || (narrow && p.dtype != Dtype::f32)) return nullptr;
  const auto kept = std::make_shared<Kept>(Kept{{p, layers_, directions_, projects, narrow ? narrow_ : Narrow::none}, {}});
  kept->packed.pack(recurrences);
  kept->stamps = std::move(stamps);
  return kept;
}

Frozen* frozen_of(PyObject* object, const char* cell, int64_t layers, int64_t directions) {
  if (object == Py_None) return nullptr;
  auto* const frozen = py::handle(object).cast<Frozen*>();
  return frozen->layers() == layers && frozen->directions() == directions && frozen->cell() == cell ? frozen : nullptr;
}

void add_frozen(PyObject* module) {
  py::class_<Frozen, std::shared_ptr<Frozen>>(py::reinterpret_borrow<py::module_>(module), "Frozen")
      .def(py::init([](const std::string& cell, const std::vector<std::string>& names, int64_t layers, int64_t directions, int narrow) {
             return std::make_shared<Frozen>(cell, names, layers, directions, Narrow(narrow));
           }),
           py::arg("cell"), py::arg("names"), py::arg("layers"), py::arg("directions"), py::arg("narrow"))
      .def("forget", &Frozen::forget)
      .def(
          "bytes",
          [](Frozen& frozen, const py::dict& tensors) -> std::optional<int64_t> {
            const auto packed = frozen.of(tensors.ptr());
            if (!packed) return {};
            return packed->bytes();
          },
          "Packs the tensors of these names, if need be; how many bytes their panels take, None where they cannot be kept.")
      .def_property_readonly(
          "arguments", [](const Frozen& f) { return py::make_tuple(f.cell(), f.names(), f.layers(), f.directions(), int(f.narrow())); });
}

}  // namespace fused_rnn::ops
