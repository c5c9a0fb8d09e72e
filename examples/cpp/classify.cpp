// Run a bundle's TensorRT engine on one input: classify BUNDLE/engines/gpu.engine INPUT.bin
// The input is raw bytes, as the engine takes it. TensorRT 8.5 and newer, C++17; shown, and not compiled by the tests.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", text);
    }
};

std::vector<char> content(const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(std::string("cannot read ") + path);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void check(bool good, const char* what) {
    if (!good) throw std::runtime_error(what);
}

int main(int count, char** arguments) try {
    check(count == 3, "classify ENGINE INPUT.bin");
    const auto plan = content(arguments[1]), input = content(arguments[2]);

    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime{nvinfer1::createInferRuntime(logger)};
    std::unique_ptr<nvinfer1::ICudaEngine> engine{runtime->deserializeCudaEngine(plan.data(), plan.size())};
    check(engine != nullptr, "the plan is for another TensorRT or another GPU");
    std::unique_ptr<nvinfer1::IExecutionContext> context{engine->createExecutionContext()};
    check(context != nullptr && engine->getNbIOTensors() == 2, "one input and one output are expected");

    const char* names[2] = {};  // the input's and the output's
    for (int i = 0; i < 2; ++i) {
        const char* name = engine->getIOTensorName(i);
        names[engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT ? 0 : 1] = name;
    }
    auto shape = engine->getTensorShape(names[0]);  // -1, 3, h, w; or -1, h, w, 3 of pixels
    shape.d[0] = 1;
    size_t expected = engine->getTensorDataType(names[0]) == nvinfer1::DataType::kUINT8 ? 1 : 4;
    for (int i = 0; i < shape.nbDims; ++i) expected *= static_cast<size_t>(shape.d[i]);
    check(input.size() == expected, "the input has another size than the engine takes");
    check(context->setInputShape(names[0], shape), "the engine does not take a batch of 1");
    const auto classes = static_cast<size_t>(context->getTensorShape(names[1]).d[1]);

    void* memory[2] = {};
    std::vector<float> logits(classes);
    cudaStream_t stream{};
    check(cudaStreamCreate(&stream) == cudaSuccess, "there is no GPU");
    check(cudaMalloc(&memory[0], input.size()) == cudaSuccess, "no memory on the GPU");
    check(cudaMalloc(&memory[1], classes * sizeof(float)) == cudaSuccess, "no memory on the GPU");
    check(context->setTensorAddress(names[0], memory[0]) && context->setTensorAddress(names[1], memory[1]), "addresses");
    cudaMemcpyAsync(memory[0], input.data(), input.size(), cudaMemcpyHostToDevice, stream);
    check(context->enqueueV3(stream), "the engine cannot be run");
    cudaMemcpyAsync(logits.data(), memory[1], classes * sizeof(float), cudaMemcpyDeviceToHost, stream);
    check(cudaStreamSynchronize(stream) == cudaSuccess, "the GPU failed");

    const auto best = std::max_element(logits.begin(), logits.end());
    std::printf("class %td, logit %g\n", best - logits.begin(), static_cast<double>(*best));
    cudaFree(memory[0]);
    cudaFree(memory[1]);
    cudaStreamDestroy(stream);
    return 0;
} catch (const std::exception& problem) {
    std::fprintf(stderr, "error: %s\n", problem.what());
    return 1;
}
