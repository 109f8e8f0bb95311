// What torch asks a device for: memory, streams, generators. The first half of sham_cuda.cpp.

#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <torch/library.h>

namespace {

using c10::Device, c10::DeviceIndex, c10::DispatchKey, c10::IValue, c10::Stream, c10::StreamId;
constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr DeviceIndex DEVICES = 2;
thread_local DeviceIndex now = 0;  // as CUDA's: each thread begins on device 0
thread_local StreamId streams[DEVICES] = {0, 0};

// Memory -------------------------------------------------------------------------------------------------------------

std::mutex pinned_lock;
std::map<char*, size_t> pinned;  // beginning -> bytes

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t count) override {
    void* data = count ? std::aligned_alloc(64, (count + 63) / 64 * 64) : nullptr;
    return {data, data, &std::free, Device(CUDA, now)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

struct PinnedMemory final : c10::Allocator {
  static void release(void* data) {
    std::lock_guard<std::mutex> held(pinned_lock);
    pinned.erase(static_cast<char*>(data));
    std::free(data);
  }
  c10::DataPtr allocate(size_t count) override {
    void* data = std::aligned_alloc(64, (count + 64) / 64 * 64);
    std::lock_guard<std::mutex> held(pinned_lock);
    pinned[static_cast<char*>(data)] = count;
    return {data, data, &release, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

Memory memory;
PinnedMemory pinned_memory;

// What torch asks a device for ---------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    now = device.index();
    return before;
  }
  Device getDevice() const override { return {CUDA, now}; }
  void setDevice(Device device) const override { now = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { now = device.index(); }
  Stream getStream(Device device) const override {
    auto index = device.has_index() ? device.index() : now;
    return Stream(Stream::UNSAFE, {CUDA, index}, streams[index]);
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::UNSAFE, device, 0); }
  Stream getNewStream(Device device, int) const override {
    static std::atomic<StreamId> made{0};
    return Stream(Stream::UNSAFE, device, ++made);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream stream) const override {
    Stream before = getStream(stream.device());
    streams[stream.device_index()] = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

struct Draws final : at::CPUGeneratorImpl {  // the CPU's, under the device's name
  explicit Draws(DeviceIndex index) { called({CUDA, index}); }
  void called(Device device) { device_ = device; }
};

struct Hooks final : at::CUDAHooksInterface {
    void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex current_device() const override { return now; }
  DeviceIndex getCurrentDevice() const override { return now; }
  Device getDeviceFromPtr(void*) const override { return {CUDA, now}; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> held(pinned_lock);
    auto next = pinned.upper_bound(static_cast<char*>(const_cast<void*>(data)));
    return next != pinned.begin() && data < std::prev(next)->first + std::max<size_t>(1, std::prev(next)->second);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Draws>(index < 0 ? now : index);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static const std::array<at::Generator, DEVICES> made = {at::make_generator<Draws>(0), at::make_generator<Draws>(1)};
    return made[index < 0 ? now : index];
  }
};

}  // namespace
