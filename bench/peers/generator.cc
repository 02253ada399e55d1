// Sends access-log messages that were serialised before, as fast as a server takes them or at a given rate.
//
//   generator PORT CONNECTIONS FILE TENANTS SECONDS RATE SEED
//
// FILE is what bench/messages.py writes. Each connection is a TCP connection of its own with one log stream, as
// each worker of an Envoy has it. RATE is messages a second and connection; 0: as fast as they are taken. A
// message is copied and three things in it are overwritten, without changing a length: the tenant's number, drawn
// at random for every entry, the namespace in its route, and the second in which it began. So any number of
// tenants needs no more than a few templates, and the server's windows are those of now.
//
// Prints one JSON object: what was sent, which a server must have counted when its streams ended with OK.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/sync_stream.h>

namespace {

using Clock = std::chrono::steady_clock;
constexpr char kMethod[] = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";
constexpr int kDigits = 7;       // of a tenant's number
constexpr int kSecondBytes = 5;  // of a varint from 2004 to 2106... and until 3058
constexpr int kRetake = 64;      // messages between two looks at the clock of a saturated connection

struct Entry {
  std::vector<uint32_t> digits;  // where the tenant's number stands
  uint32_t second;               // where the second of its start stands
};

struct Template {
  std::string bytes;
  uint64_t in, out, ns;
  std::vector<Entry> entries;
};

struct Sent {
  uint64_t messages = 0, entries = 0, in = 0, out = 0, ns = 0, bytes = 0;
  bool ok = true;
  std::string error;
};

template <typename T>
T Take(std::istream& file) {
  T value{};
  file.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

// The first message of a stream, then the templates; numbers are little-endian.
std::vector<Template> Load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<Template> templates(Take<uint32_t>(file));
  for (Template& one : templates) {
    one.bytes.resize(Take<uint32_t>(file));
    file.read(one.bytes.data(), static_cast<std::streamsize>(one.bytes.size()));
    one.in = Take<uint64_t>(file);
    one.out = Take<uint64_t>(file);
    one.ns = Take<uint64_t>(file);
    one.entries.resize(Take<uint32_t>(file));
    for (Entry& entry : one.entries) {
      entry.digits.resize(Take<uint32_t>(file));
      for (uint32_t& at : entry.digits) at = Take<uint32_t>(file);
      entry.second = Take<uint32_t>(file);
    }
  }
  if (!file || templates.size() < 2) {
    std::fprintf(stderr, "generator: %s is no file of messages\n", path);
    std::exit(2);
  }
  return templates;
}

uint64_t Next(uint64_t& state) {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 2685821657736338717ULL;
}

void WriteNumber(char* at, uint32_t number) {
  for (int digit = kDigits - 1; digit >= 0; --digit, number /= 10) at[digit] = static_cast<char>('0' + number % 10);
}

void WriteSecond(char* at, uint64_t second) {
  for (int byte = 0; byte < kSecondBytes; ++byte, second >>= 7)
    at[byte] = static_cast<char>((second & 0x7f) | (byte + 1 < kSecondBytes ? 0x80 : 0));
}

void Patch(char* bytes, const Template& from, uint32_t tenants, uint64_t second, uint64_t& dice,
           std::vector<bool>& seen) {
  for (const Entry& entry : from.entries) {
    const uint32_t tenant = static_cast<uint32_t>((Next(dice) >> 32) * tenants >> 32);
    seen[tenant] = true;
    for (uint32_t at : entry.digits) WriteNumber(bytes + at, tenant);
    WriteSecond(bytes + entry.second, second);
  }
}

Sent Stream(int port, const std::vector<Template>& templates, uint32_t tenants, double seconds, double rate,
            uint64_t seed, std::vector<bool>& seen) {
  grpc::ChannelArguments arguments;
  arguments.SetInt("grpc.use_local_subchannel_pool", 1);  // or all of them would share one connection
  auto channel = grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port), grpc::InsecureChannelCredentials(),
                                           arguments);
  Sent sent;
  if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(10))) {
    sent.ok = false;
    sent.error = "not connected";
    return sent;
  }
  grpc::ClientContext context;
  grpc::ByteBuffer response;
  grpc::internal::RpcMethod method(kMethod, grpc::internal::RpcMethod::CLIENT_STREAMING, channel);
  std::unique_ptr<grpc::ClientWriter<grpc::ByteBuffer>> writer(
      grpc::internal::ClientWriterFactory<grpc::ByteBuffer>::Create(channel.get(), method, &context, &response));
  uint64_t dice = seed * 0x9E3779B97F4A7C15ULL + 1;
  const auto began = Clock::now();
  const auto end = began + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  const auto gap = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(rate > 0 ? 1 / rate : 0));
  // Streams of one sender are never in step: each begins at its own part of the gap.
  auto due = began + gap * static_cast<int64_t>(seed % 16) / 16;
  uint64_t second = 0;
  bool alive = true;
  for (uint64_t number = 0; alive; ++number) {
    if (rate > 0) {
      std::this_thread::sleep_until(due);
      due += gap;
      if (Clock::now() >= end) break;
    } else if (number % kRetake == 0 && Clock::now() >= end) {
      break;
    }
    if (rate > 0 || number % kRetake == 0) second = static_cast<uint64_t>(std::time(nullptr)) - 1;
    // The stream's first message says who sends, the others are taken in turn.
    const Template& from = templates[number == 0 ? 0 : 1 + (number + seed) % (templates.size() - 1)];
    grpc::Slice slice(from.bytes.size());
    char* bytes = const_cast<char*>(reinterpret_cast<const char*>(slice.begin()));
    std::memcpy(bytes, from.bytes.data(), from.bytes.size());
    Patch(bytes, from, tenants, second, dice, seen);
    grpc::ByteBuffer buffer(&slice, 1);
    alive = writer->Write(buffer);
    if (!alive) break;
    sent.messages += number > 0;
    sent.entries += from.entries.size();
    sent.in += from.in;
    sent.out += from.out;
    sent.ns += from.ns;
    sent.bytes += from.bytes.size();
  }
  writer->WritesDone();
  const grpc::Status status = writer->Finish();  // the server has read everything
  sent.ok = status.ok() && alive;
  sent.error = status.error_message();
  return sent;
}

}  // namespace

int main(int count, char** words) {
  if (count != 8) {
    std::fprintf(stderr, "usage: generator PORT CONNECTIONS FILE TENANTS SECONDS RATE SEED\n");
    return 2;
  }
  const int port = std::atoi(words[1]), connections = std::atoi(words[2]);
  const std::vector<Template> templates = Load(words[3]);
  const auto tenants = static_cast<uint32_t>(std::atol(words[4]));
  const double seconds = std::atof(words[5]), rate = std::atof(words[6]);
  const uint64_t seed = std::strtoull(words[7], nullptr, 10);
  std::vector<bool> known(tenants);
  std::mutex mutex;
  Sent all;
  const auto began = Clock::now();
  std::vector<std::thread> threads;
  for (int number = 0; number < connections; ++number) {
    threads.emplace_back([&, number] {
      std::vector<bool> seen(tenants);
      const Sent one = Stream(port, templates, tenants, seconds, rate, seed * 1000 + number, seen);
      const std::lock_guard<std::mutex> guard(mutex);
      all.messages += one.messages;
      all.entries += one.entries;
      all.in += one.in;
      all.out += one.out;
      all.ns += one.ns;
      all.bytes += one.bytes;
      all.ok = all.ok && one.ok;
      if (!one.error.empty()) all.error = one.error;
      for (uint32_t tenant = 0; tenant < tenants; ++tenant)
        if (seen[tenant]) known[tenant] = true;
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double took = std::chrono::duration<double>(Clock::now() - began).count();
  uint64_t distinct = 0;
  for (bool one : known) distinct += one;
  std::printf(
      "{\"messages\": %llu, \"entries\": %llu, \"bytes_in\": %llu, \"bytes_out\": %llu, \"ns\": %llu,"
      " \"wire\": %llu, \"tenants\": %llu, \"seconds\": %.6f, \"ok\": %s}\n",
      (unsigned long long)all.messages, (unsigned long long)all.entries, (unsigned long long)all.in,
      (unsigned long long)all.out, (unsigned long long)all.ns, (unsigned long long)all.bytes,
      (unsigned long long)distinct, took, all.ok ? "true" : "false");
  if (!all.ok) std::fprintf(stderr, "generator: a stream ended badly: %s\n", all.error.c_str());
  return all.ok ? 0 : 1;
}
