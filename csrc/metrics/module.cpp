// refsam.metrics._native: checks of numpy arrays, threads over frames, registration.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <future>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "region_contour.h"

namespace py = pybind11;

namespace refsam::metrics {
namespace {

// Frames (T, H, W) of bool or uint8 in C order.
struct Frames {
  const uint8_t* pixels;
  int64_t count, height, width;

  Image operator[](int64_t t) const { return {pixels + t * height * width, height, width}; }
};

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

Frames check_frames(const char* name, const py::array& array) {
  const char kind = array.dtype().kind();
  check((kind == 'b' || kind == 'u') && array.itemsize() == 1, name, ": got dtype ",
        std::string(py::str(array.dtype())), ", wanted bool or uint8");
  check(array.ndim() == 3, name, ": got ", array.ndim(), " dimensions, wanted 3 (T, H, W)");
  check((array.flags() & py::array::c_style) != 0, name, ": wanted an array in C order");
  check(array.shape(1) > 0 && array.shape(2) > 0, name, ": got an empty image, wanted H, W >= 1");
  return {static_cast<const uint8_t*>(array.data()), array.shape(0), array.shape(1),
          array.shape(2)};
}

// Prediction, truth and void pixels of the same shape.
struct Input {
  Frames prediction, truth;
  std::optional<Frames> unknown;
};

Frames check_like(const char* name, const py::array& array, const Frames& first) {
  const Frames frames = check_frames(name, array);
  check(frames.count == first.count && frames.height == first.height && frames.width == first.width,
        name, ": got shape (", frames.count, ", ", frames.height, ", ", frames.width, "), wanted (",
        first.count, ", ", first.height, ", ", first.width, ")");
  return frames;
}

Input check_input(const py::array& prediction, const py::array& truth,
                  const std::optional<py::array>& unknown) {
  const Frames first = check_frames("prediction", prediction);
  Input input{first, check_like("truth", truth, first), std::nullopt};
  if (unknown) input.unknown = check_like("void", *unknown, first);
  return input;
}

std::vector<int64_t> check_radius(int64_t radius, const Frames& frames) {
  check(radius >= 0, "radius: got ", radius, ", wanted at least 0");
  // A disk that covers the image is as good as any larger one, and its squares fit 64 bits.
  return disk_reach(std::min(radius, frames.height + frames.width));
}

// Calls work(t) for all frames on some threads, without Python's lock.
void for_each_frame(int64_t frames, int64_t threads, const std::function<void(int64_t)>& work) {
  const py::gil_scoped_release released;
  std::atomic<int64_t> next{0};
  const auto take_frames = [&] {
    for (int64_t t = next++; t < frames; t = next++) work(t);
  };
  std::vector<std::future<void>> helpers;
  for (int64_t i = 1; i < std::min(threads, frames); ++i) {
    helpers.push_back(std::async(std::launch::async, take_frames));
  }
  take_frames();
  for (auto& helper : helpers) helper.get();
}

BitMap known(BitMap mask, const std::optional<Frames>& unknown, int64_t t) {
  if (unknown) clear_where(mask, where_unequal((*unknown)[t], 0));
  return mask;
}

py::array_t<double> region(const py::array& prediction, const py::array& truth,
                           const std::optional<py::array>& unknown, int64_t threads) {
  const Input input = check_input(prediction, truth, unknown);
  py::array_t<double> scores(input.truth.count);
  double* out = scores.mutable_data();
  for_each_frame(input.truth.count, threads, [&](int64_t t) {
    const auto object = [&](const Frames& frames) {
      return make_region(known(where_unequal(frames[t], 0), input.unknown, t));
    };
    out[t] = region_similarity(object(input.prediction), object(input.truth));
  });
  return scores;
}

py::array_t<double> contour(const py::array& prediction, const py::array& truth,
                            const std::optional<py::array>& unknown, int64_t radius,
                            int64_t threads) {
  const Input input = check_input(prediction, truth, unknown);
  const std::vector<int64_t> reach = check_radius(radius, input.truth);
  py::array_t<double> scores(input.truth.count);
  double* out = scores.mutable_data();
  for_each_frame(input.truth.count, threads, [&](int64_t t) {
    const auto object = [&](const Frames& frames) {
      return make_contour(known(where_unequal(frames[t], 0), input.unknown, t), reach);
    };
    out[t] = contour_accuracy(object(input.prediction), object(input.truth));
  });
  return scores;
}

// One object of a map of object numbers, with all that its scores need.
struct Object {
  Region region;
  Contour contour;
};

// The objects of one frame; a number that a pixel cannot hold is an empty object.
std::vector<Object> find_objects(const Frames& frames, const std::vector<int64_t>& ids,
                                 const std::optional<Frames>& unknown,
                                 const std::vector<int64_t>& reach, int64_t t) {
  std::vector<Object> objects;
  for (const int64_t id : ids) {
    BitMap mask = 0 <= id && id <= 255 ? where_equal(frames[t], static_cast<uint8_t>(id))
                                       : BitMap(frames.height, frames.width);
    mask = known(std::move(mask), unknown, t);
    Contour contour = make_contour(mask, reach);
    objects.push_back({make_region(std::move(mask)), std::move(contour)});
  }
  return objects;
}

// (2, truth ids, prediction ids, T): J, then F.
py::array_t<double> labels(const py::array& prediction, const py::array& truth,
                           const std::optional<py::array>& unknown,
                           const std::vector<int64_t>& prediction_ids,
                           const std::vector<int64_t>& truth_ids, int64_t radius, int64_t threads) {
  const Input input = check_input(prediction, truth, unknown);
  const std::vector<int64_t> reach = check_radius(radius, input.truth);
  const int64_t frames = input.truth.count;
  const auto pairs = static_cast<int64_t>(prediction_ids.size() * truth_ids.size());
  py::array_t<double> scores({int64_t{2}, static_cast<int64_t>(truth_ids.size()),
                              static_cast<int64_t>(prediction_ids.size()), frames});
  double* out = scores.mutable_data();
  for_each_frame(frames, threads, [&](int64_t t) {
    const std::vector<Object> predicted =
        find_objects(input.prediction, prediction_ids, input.unknown, reach, t);
    double* region_out = out + t;
    double* contour_out = region_out + pairs * frames;
    for (const Object& object : find_objects(input.truth, truth_ids, input.unknown, reach, t)) {
      for (const Object& other : predicted) {
        *region_out = region_similarity(other.region, object.region);
        *contour_out = contour_accuracy(other.contour, object.contour);
        region_out += frames;
        contour_out += frames;
      }
    }
  });
  return scores;
}

}  // namespace
}  // namespace refsam::metrics

PYBIND11_MODULE(_native, m) {
  using namespace refsam::metrics;
  m.doc() = "J and F on masks (T, H, W) of bool or uint8; see refsam.metrics.region_contour.";
  m.def("region", &region, py::arg("prediction"), py::arg("truth"), py::arg("void"),
        py::arg("threads"));
  m.def("contour", &contour, py::arg("prediction"), py::arg("truth"), py::arg("void"),
        py::arg("radius"), py::arg("threads"));
  m.def("labels", &labels, py::arg("prediction"), py::arg("truth"), py::arg("void"),
        py::arg("prediction_ids"), py::arg("truth_ids"), py::arg("radius"), py::arg("threads"));
}
