// A device guard for CUDA that does nothing, and a claim that CUDA is this build's accelerator.
//
// Autograd asks both before it takes a gradient of a tensor "on" cuda; a CPU build of torch has neither. This library is
// loaded before libtorch_cpu, so that its `getAccelerator` is found first.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <optional>

namespace {

c10::Device the_device() { return c10::Device(c10::DeviceType::CUDA, 0); }
c10::Stream the_stream() { return c10::Stream(c10::Stream::DEFAULT, the_device()); }

class IdleGuard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return the_device(); }
  c10::Device exchangeDevice(c10::Device) const override { return the_device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return the_stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return the_stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return the_stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

const bool is_registered = [] {
  auto& slot = c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
  slot.store(new IdleGuard());
  return true;
}();

}  // namespace

namespace at::accelerator {

__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}

}  // namespace at::accelerator
