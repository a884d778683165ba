// Segments a picture with an AOTInductor package that `segkern export` wrote, without Python.
// segment ./libsegkern.so model.pt2 picture.ppm [results.pt]
// The picture (binary PPM, 8 bits) has the size at which the model is to see it. Prints the share
// of each class; results.pt takes the model's results, for torch.load.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

using Metadata = std::unordered_map<std::string, std::string>;

// A list of numbers, one a channel, as [C, 1, 1]
at::Tensor channels(const Metadata& about, const std::string& name) {
  std::istringstream text(about.at(name));
  std::vector<double> values{std::istream_iterator<double>(text), {}};
  return at::tensor(values, at::kFloat).view({-1, 1, 1});
}

// [1, 3, h, w], normalised and padded to the right and below, and the picture's own sides
at::Tensor read(const char* path, const Metadata& about, int64_t& height, int64_t& width) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int most = 0;
  file >> magic >> width >> height >> most;
  TORCH_CHECK(file && magic == "P6" && most == 255, path, " is no binary PPM of 8 bits");
  file.get();  // the one white space before the pixels
  at::Tensor bytes = at::empty({height, width, 3}, at::kByte);
  file.read(reinterpret_cast<char*>(bytes.mutable_data_ptr<uint8_t>()), bytes.numel());
  TORCH_CHECK(file, path, " ends before its last pixel");
  const int64_t divisor = std::stoll(about.at("divisor"));
  const auto padded = [&](int64_t side) { return (side + divisor - 1) / divisor * divisor; };
  at::Tensor pixels = channels(about, "padding").repeat({1, padded(height), padded(width)});
  pixels.slice(1, 0, height).slice(2, 0, width) =
      (bytes.permute({2, 0, 1}).to(at::kFloat) / 255 - channels(about, "mean")) /
      channels(about, "std");
  return pixels.unsqueeze(0);
}

// Compiled code takes whatever it is given for what it was compiled for; 0 stands for any number
void check(const at::Tensor& pixels, const Metadata& about) {
  std::istringstream shape(about.at("shape"));
  for (int64_t axis = 0, side = 0; shape >> side; ++axis)
    TORCH_CHECK(side == 0 || side == pixels.size(axis), "axis ", axis, " of the pixels must be ",
                side, ", got ", pixels.size(axis));
}

// The class of each place of the model's own maps, [m, n]
at::Tensor classes(const std::vector<at::Tensor>& results) {
  TORCH_CHECK(results.size() <= 2, "the file must give logits or --post semantic");
  if (!results[0].is_floating_point()) return results[0][0];            // --post semantic
  if (results.size() == 1) return results[0][0].argmax(0);              // class logits of pixels
  const at::Tensor weights = results[0][0].softmax(1).slice(1, 0, -1);  // without "no object"
  const at::Tensor shares = results[1][0].sigmoid();
  return at::matmul(weights.t(), shares.flatten(1)).argmax(0).view(shares[0].sizes());
}

int main(int argc, char** argv) try {
  TORCH_CHECK(argc > 3, "usage: segment ./libsegkern.so model.pt2 picture.ppm [results.pt]");
  TORCH_CHECK(dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL), "no kernels: ", dlerror());
  TORCH_CHECK(std::ifstream(argv[2]), "no file ", argv[2]);
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  int64_t height = 0, width = 0;
  const at::Tensor pixels = read(argv[3], model.get_metadata(), height, width);
  check(pixels, model.get_metadata());
  const std::vector<at::Tensor> results = model.run({pixels});
  at::Tensor found = classes(results);  // what lies in the padding is no part of the picture
  const auto inside = [&](int64_t axis, int64_t side) {
    return (found.size(axis) * side + pixels.size(axis + 2) - 1) / pixels.size(axis + 2);
  };
  found = found.slice(0, 0, inside(0, height)).slice(1, 0, inside(1, width));
  const at::Tensor counts = at::bincount(found.flatten().to(at::kLong));
  for (int64_t label = 0; label < counts.numel(); ++label) {
    const double share = counts[label].item<double>() / found.numel();
    if (share > 0) std::printf("class %ld: %.4f\n", static_cast<long>(label), share);
  }
  if (argc > 4) {
    const std::vector<c10::IValue> kept(results.begin(), results.end());
    const auto bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(kept));
    std::ofstream(argv[4], std::ios::binary).write(bytes.data(), bytes.size());
  }
} catch (const c10::Error& error) {
  std::cerr << "segment: " << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {  // such as metadata of somebody else's file
  std::cerr << "segment: " << error.what() << "\n";
  return 1;
}
