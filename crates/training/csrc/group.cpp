// libtorch's c10d behind a C interface, called from src/ranks/group.rs: a TCPStore where processes find each other, and a
// ProcessGroupGloo over it. Tensors are dense and lie on the CPU; exceptions become messages.
#define USE_C10D_GLOO
#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace {

thread_local std::string last_error;

struct Group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo;
};

template <typename Work>
int guarded(Work&& work) {
  try {
    work();
    return 0;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an exception of an unknown type";
  }
  return 1;
}

at::Tensor tensor(const void* raw) { return *static_cast<const at::Tensor*>(raw); }

}  // namespace

extern "C" {

const char* arete_group_error() { return last_error.c_str(); }

// Opens the store on rank 0, finds it on the others; no operation is possible yet.
int arete_group_join(const char* host, uint16_t port, int rank, int n_ranks, int64_t join_ms, void** out) {
  return guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = rank == 0;
    options.numWorkers = n_ranks;
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(join_ms);
    *out = new Group{c10::make_intrusive<c10d::TCPStore>(host, options), nullptr};
  });
}

// Connects every process with every other. `interface` (a network interface) may be null; then `address` (this machine's) is
// bound to, or where that is null too what this machine's host name stands for.
int arete_group_connect(void* raw, int rank, int n_ranks, const char* interface, const char* address,
                        int64_t operation_ms) {
  return guarded([&] {
    Group* group = static_cast<Group*>(raw);
    auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::milliseconds(operation_ms));
    options->threads = 1;
    options->devices.push_back(interface != nullptr ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                               : address != nullptr ? c10d::ProcessGroupGloo::createDeviceForHostname(address)
                                                    : c10d::ProcessGroupGloo::createDefaultDevice());
    group->gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(group->store, rank, n_ranks, options);
  });
}

void arete_group_leave(void* group) {
  guarded([&] { delete static_cast<Group*>(group); });
}

int arete_group_set(void* group, const char* key, const uint8_t* value, size_t n) {
  return guarded([&] { static_cast<Group*>(group)->store->set(key, std::vector<uint8_t>(value, value + n)); });
}

// Waits for the key; at most `capacity` bytes of its value are copied, and its length is returned in `n`.
int arete_group_get(void* group, const char* key, int64_t wait_ms, uint8_t* value, size_t capacity, size_t* n) {
  return guarded([&] {
    auto& store = static_cast<Group*>(group)->store;
    store->wait({key}, std::chrono::milliseconds(wait_ms));
    std::vector<uint8_t> found = store->get(key);
    *n = found.size();
    std::memcpy(value, found.data(), std::min(capacity, found.size()));
  });
}

int arete_group_broadcast(void* group, const void* values, int root) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{tensor(values)};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    static_cast<Group*>(group)->gloo->broadcast(tensors, options)->wait();
  });
}

int arete_group_sum(void* group, const void* values) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{tensor(values)};
    static_cast<Group*>(group)->gloo->allreduce(tensors)->wait();
  });
}

int arete_group_gather(void* group, const void* all, const void* own) {
  return guarded([&] {
    at::Tensor out = tensor(all), in = tensor(own);
    static_cast<Group*>(group)->gloo->_allgather_base(out, in)->wait();
  });
}

int arete_group_exchange(void* group, const void* received, const void* sent, const int64_t* n_received,
                         const int64_t* n_sent, size_t n_ranks) {
  return guarded([&] {
    at::Tensor out = tensor(received), in = tensor(sent);
    std::vector<int64_t> out_counts(n_received, n_received + n_ranks), in_counts(n_sent, n_sent + n_ranks);
    static_cast<Group*>(group)->gloo->alltoall_base(out, in, out_counts, in_counts)->wait();
  });
}
}
