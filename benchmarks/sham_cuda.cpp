// A device called cuda in a torch that was built without it: its memory is the host's, and every operator on it is the
// CPU's, computed on the same bytes. So a whole step runs on "cuda", and an operator whose tensors lie on two devices
// is refused as CUDA refuses it. Built and loaded by sham_cuda.py, which gives torch.cuda the answers that go with it.

#include "sham_cuda.h"

namespace {

// One call of an operator: its tensors on cuda stand for the CPU's over the same bytes until it is over.
struct Call {
  std::map<c10::StorageImpl*, std::pair<c10::Storage, c10::Storage>> by_host;    // of the CPU -> (it, ours)
  std::map<c10::StorageImpl*, c10::Storage> by_ours;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;  // (ours, the CPU's)
  std::vector<Draws*> draws;
  std::optional<Device> device;

  static Device complete(Device device) { return {CUDA, device.has_index() ? device.index() : now}; }

  at::Tensor to_host(const at::Tensor& ours) {
    if (!ours.defined() || !ours.is_cuda()) return ours;
    device = device.value_or(ours.device());
    auto* impl = ours.storage().unsafeGetStorageImpl();
    TORCH_CHECK(ours.numel() == 0 || impl->data() != nullptr, "a tensor on ", ours.device(),
        " was used after its memory was freed");
    auto& storage = by_ours[impl];
    if (!storage) {
      auto data = c10::DataPtr(const_cast<void*>(ours.storage().data()), Device(c10::DeviceType::CPU));
      storage = c10::Storage(c10::Storage::use_byte_size_t(), impl->nbytes(), std::move(data),
          c10::GetAllocator(c10::DeviceType::CPU), true);
      by_host[storage.unsafeGetStorageImpl()] = {storage, ours.storage()};
    }
    auto host = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage),
        c10::DispatchKeySet(DispatchKey::CPU), ours.dtype());
    host.unsafeGetTensorImpl()->set_sizes_and_strides(ours.sizes(), ours.strides(), ours.storage_offset());
    if (ours.unsafeGetTensorImpl()->is_wrapped_number()) host.unsafeGetTensorImpl()->set_wrapped_number(true);
    tensors.emplace_back(ours, host);
    return host;
  }

  IValue to_host(const IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& each : value.toTensorVector()) made.push_back(to_host(each));
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> made;
      for (const auto& each : value.toOptionalTensorVector())
        made.push_back(each ? std::optional<at::Tensor>(to_host(*each)) : std::nullopt);
      return made;
    }
    if (value.isDevice() && value.toDevice().type() == CUDA) {
      device = complete(value.toDevice());
      return Device(c10::DeviceType::CPU);
    }
    if (value.isGenerator() && value.toGenerator().device().type() == CUDA) {
      draws.push_back(static_cast<Draws*>(value.toGenerator().unsafeGetGeneratorImpl()));
      draws.back()->called(Device(c10::DeviceType::CPU));
    }
    return value;
  }

  at::Tensor to_ours(const at::Tensor& host) {
    if (!host.defined()) return host;
    c10::Storage storage;
    auto known = by_host.find(host.storage().unsafeGetStorageImpl());
    storage = known != by_host.end() ? known->second.second : adopted(host.storage());
    auto ours = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
        c10::DispatchKeySet(DispatchKey::CUDA), host.dtype());
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    return ours;
  }

  IValue to_ours(const IValue& value) {
    if (value.isTensor()) return to_ours(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> made;
    for (const at::Tensor& each : value.toTensorVector()) made.push_back(to_ours(each));
    return made;
  }

  c10::DataPtr owned(const c10::Storage& host) const {
    auto* holder = new c10::Storage(host);
    auto release = [](void* held) { delete static_cast<c10::Storage*>(held); };
    return {const_cast<void*>(host.data()), holder, release, *device};
  }

  c10::Storage adopted(const c10::Storage& host) const {
    return {c10::Storage::use_byte_size_t(), host.nbytes(), owned(host), &memory, true};
  }

  // What the operator has resized or moved, resize and move alike.
  void settle() {
    for (auto* each : draws) each->called(Device(CUDA, now));
    for (auto& [ours, host] : tensors) {
      auto *mine = ours.storage().unsafeGetStorageImpl(), *theirs = host.storage().unsafeGetStorageImpl();
      auto known = by_host.find(theirs);
      if (known != by_host.end() && mine->data() != theirs->data()) {
        mine->set_data_ptr_noswap(owned(known->second.first));
        mine->set_nbytes(theirs->nbytes());
      }
      if (ours.sizes() != host.sizes() || ours.strides() != host.strides())
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
};

void each_tensor(const IValue& value, const std::function<void(const at::Tensor&)>& look) {
  if (value.isTensor()) look(value.toTensor());
  else if (value.isTensorList()) for (const at::Tensor& each : value.toTensorVector()) look(each);
  else if (value.isOptionalTensorList())
    for (const auto& each : value.toOptionalTensorVector()) if (each) look(*each);
}

// As CUDA does: all on one device, but for numbers (0-dim tensors on the host) in operators that take them as such.
void check_devices(const c10::OperatorHandle& op, at::ArrayRef<IValue> args) {
  static const std::set<std::string> COPIES = {"aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"};
  static const std::set<std::string> NUMBERS = {"aten::index_put_", "aten::_index_put_impl_", "aten::masked_fill_",
      "aten::fill_"};
  const auto& name = op.operator_name().name;
  if (COPIES.count(name)) return;
  bool numbers = op.hasTag(at::Tag::pointwise) || NUMBERS.count(name) || name.find("::_foreach_") !=
      std::string::npos;
  std::optional<Device> found;
  std::string offending;
  for (const IValue& arg : args) {
    each_tensor(arg, [&](const at::Tensor& tensor) {
      bool number = tensor.defined() && tensor.dim() == 0 && tensor.device().is_cpu();
      if (!tensor.defined() || (number && (numbers || tensor.unsafeGetTensorImpl()->is_wrapped_number()))) return;
      if (found && *found != tensor.device()) offending = found->str() + " and " + tensor.device().str();
      found = found.value_or(tensor.device());
    });
    if (arg.isGenerator() && arg.toGenerator().device().type() != CUDA) offending = "cuda and a generator on cpu";
  }
  TORCH_CHECK(offending.empty(), "Expected all tensors to be on the same device, but ", op.operator_name(),
      " got ", offending);
}

void on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto count = schema.arguments().size();
  auto args = torch::jit::pop(*stack, count);
  check_devices(op, args);
  Call call;
  for (const IValue& arg : args) stack->push_back(call.to_host(arg));
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  call.settle();
  auto results = torch::jit::pop(*stack, schema.returns().size());
  for (size_t index = 0; index < results.size(); ++index) {
    const auto* changed = schema.returns()[index].alias_info();
    const IValue* given = nullptr;
    for (size_t at = 0; changed && changed->isWrite() && at < count; ++at) {
      const auto* mine = schema.arguments()[at].alias_info();
      if (mine && mine->isWrite() && mine->beforeSets() == changed->beforeSets()) given = &args[at];
    }
    stack->push_back(given ? *given : call.device ? call.to_ours(results[index]) : results[index]);
  }
}

void nothing(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef sizes,
    c10::SymIntArrayRef strides) {
  auto size = C10_AS_INTARRAYREF_SLOW(sizes), stride = C10_AS_INTARRAYREF_SLOW(strides);
  TORCH_CHECK(source.device() == self.device(), "set_ got storage on ", source.device(), " for a tensor on ",
      self.device());
  std::vector<int64_t> dense(size.size(), 1);
  for (int64_t at = static_cast<int64_t>(size.size()) - 2; at >= 0; --at) dense[at] =
      dense[at + 1] * std::max<int64_t>(1, size[at + 1]);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride.empty() && !size.empty()
      ? at::IntArrayRef(dense) : stride, offset.expect_int());
  return self;
}

at::Tensor& set_flat(at::Tensor& self, at::Storage source) {
  auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, c10::SymIntArrayRef(c10::SymInt(count)), {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  TORCH_CHECK(source.device() == self.device(), "set_ got a tensor on ", source.device(), " for one on ",
      self.device());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source.storage());
  self.unsafeGetTensorImpl()->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

void resize_storage(const at::Tensor& over, int64_t bytes) {
  auto* storage = over.storage().unsafeGetStorageImpl();
  auto data = memory.allocate(bytes);
  if (bytes) std::memcpy(data.get(), storage->data(), std::min<size_t>(bytes, storage->nbytes()));
  storage->set_data_ptr_noswap(std::move(data));
  storage->set_nbytes(bytes);
}

const std::set<std::string> OWN = {"aten::set_", "aten::record_stream", "aten::histc"};  // histc: in sham_cuda.py

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("record_stream", torch::CppFunction::makeFromBoxedFunction<&nothing>());
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_flat);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY(sham_cuda, library) {
  library.def("resize(Tensor storage, int bytes) -> ()", &resize_storage);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

extern "C" {

// Every operator that the CPU has a kernel of: what is composed of others on any device composes here too. Returns
// their number; -1 if there is a device already.
int sham_cuda_begin() {
  if (c10::impl::hasDeviceGuardImpl(CUDA)) return -1;
  c10::impl::registerDeviceGuard(CUDA, new Guard());
  c10::SetAllocator(CUDA, &memory);
  // torch has made the hooks of a device that is not there when it was imported; ours hold nothing, and take their
  // place.
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
  int taken = 0;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    bool own = OWN.count(name.name) > 0;
    if (!op || own || !op->hasSchema() || !op->hasKernelForDispatchKey(DispatchKey::CPU)
        || op->hasKernelForDispatchKey(DispatchKey::CUDA))
      continue;
    static std::vector<c10::RegistrationHandleRAII> kept;
    kept.push_back(dispatcher.registerImpl(name, DispatchKey::CUDA,
        c10::KernelFunction::makeFromBoxedFunction<&on_host>(), {}, nullptr, "sham cuda"));
    ++taken;
  }
  return taken;
}

void sham_cuda_pin(char* data, size_t count) {
  std::lock_guard<std::mutex> held(pinned_lock);
  pinned[data] = count;
}

void sham_cuda_unpin(char* data) {
  std::lock_guard<std::mutex> held(pinned_lock);
  pinned.erase(data);
}

int sham_cuda_device() { return now; }
void sham_cuda_set_device(int index) { now = static_cast<DeviceIndex>(index); }
}
