// safetensors: no header reads outside the file or allocates more than the file holds.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const MemoryFile memory(data, size);
    static const Layout layout = layout_of({1, 1, 2, 2, 3});
    accepts([&] {
        const SafetensorsFile file(memory.path());
        accepts([&] { match_tensors(file, layout.tensors); });
        for (const StoredTensor& tensor : file.tensors) {
            check(tensor.end <= size, "a tensor is inside its file");
            accepts([&] {
                std::vector<float> out(tensor.count());
                file.read(tensor, out.data());
                for (float x : out) check(std::isfinite(x), "a number");
            });
            accepts([&] {
                std::vector<double> out(tensor.count());
                file.read(tensor, out.data());
            });
        }
    });
    return 0;
}
