// Runs a package of AOTInductor's without Python: x [T, B, 16], any T and B.
// docs/deploying.md has the command that builds it.

#include <ATen/ops/ones.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: serve fused_rnn/_C.*.so package.pt2\n");
    return 2;
  }
  // The operators that the package calls register themselves when their library is loaded.
  if (!dlopen(argv[1], RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  for (const int64_t steps : {5, 50}) {
    const at::Tensor y = model.run({at::ones({steps, 2, 16})})[0];
    std::printf("T=%d sum %.6f\n", int(steps), y.sum().item<double>());
  }
}
