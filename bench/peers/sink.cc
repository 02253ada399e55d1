// A plain sink in C++: gRPC's synchronous server, protobuf's classes of Envoy's full schema, one map behind a lock.
//
//   sink PORT WINDOW_MS
//
// It adds up (tenant, region, gateway, route) -> count, bytes, time in windows by when a row ended, as the other
// peers do. A window that ended five seconds ago is given up and only its sums are kept. Prints "ready" when it
// listens and, after SIGTERM, one JSON object with what it counted.

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include <grpcpp/grpcpp.h>

#include "envoy/service/accesslog/v3/als.grpc.pb.h"

namespace {

namespace als = envoy::service::accesslog::v3;
namespace data = envoy::data::accesslog::v3;
constexpr int64_t kGraceMs = 5000;

struct Sums {
  uint64_t entries = 0, in = 0, out = 0, ns = 0;
  void Add(const Sums& more) {
    entries += more.entries;
    in += more.in;
    out += more.out;
    ns += more.ns;
  }
};

class Windows {
 public:
  explicit Windows(int64_t length_ms) : length_ms_(length_ms) {}

  void Add(int64_t ended_ms, std::string&& key, const Sums& row) {
    const int64_t window = ended_ms - ended_ms % length_ms_;
    if (window > newest_) {
      newest_ = window;
      Close(window - kGraceMs - length_ms_);
    }
    open_[window][std::move(key)].Add(row);
  }

  void Close(int64_t before) {
    while (!open_.empty() && open_.begin()->first < before) {
      for (const auto& [key, sums] : open_.begin()->second) closed_.Add(sums);
      keys_ = std::max(keys_, open_.begin()->second.size());
      open_.erase(open_.begin());
    }
  }

  const Sums& closed() const { return closed_; }
  size_t keys() const { return keys_; }

 private:
  const int64_t length_ms_;
  int64_t newest_ = 0;
  std::map<int64_t, std::unordered_map<std::string, Sums>> open_;
  Sums closed_;
  size_t keys_ = 0;
};

class Sink final : public als::AccessLogService::Service {
 public:
  explicit Sink(int64_t length_ms) : windows_(length_ms) {}

  grpc::Status StreamAccessLogs(grpc::ServerContext*, grpc::ServerReader<als::StreamAccessLogsMessage>* reader,
                                als::StreamAccessLogsResponse*) override {
    als::StreamAccessLogsMessage message;
    std::string region;
    while (reader->Read(&message)) {
      if (message.has_identifier()) region = message.identifier().node().locality().region();
      const std::lock_guard<std::mutex> guard(mutex_);
      for (const auto& entry : message.http_logs().log_entry()) {
        const auto& common = entry.common_properties();
        Fold(common, region, common.downstream_wire_bytes_received(), common.downstream_wire_bytes_sent());
      }
      for (const auto& entry : message.tcp_logs().log_entry())
        Fold(entry.common_properties(), region, entry.connection_properties().received_bytes(),
             entry.connection_properties().sent_bytes());
    }
    return grpc::Status::OK;
  }

  void Print() {
    const std::lock_guard<std::mutex> guard(mutex_);
    windows_.Close(INT64_MAX);
    const Sums& all = windows_.closed();
    std::printf("{\"entries\": %llu, \"bytes_in\": %llu, \"bytes_out\": %llu, \"ns\": %llu, \"keys\": %zu}\n",
                (unsigned long long)all.entries, (unsigned long long)all.in, (unsigned long long)all.out,
                (unsigned long long)all.ns, windows_.keys());
  }

 private:
  void Fold(const data::AccessLogCommon& common, const std::string& region, uint64_t in, uint64_t out) {
    const auto& tags = common.custom_tags();
    const auto tenant = tags.find("project_name"), gateway = tags.find("gateway");
    std::string key;
    key.reserve(160);
    if (tenant != tags.end()) key += tenant->second;
    key.push_back('\0');
    key += region;
    key.push_back('\0');
    if (gateway != tags.end()) key += gateway->second;
    key.push_back('\0');
    key += common.route_name();
    const int64_t ns = common.duration().seconds() * 1000000000 + common.duration().nanos();
    const int64_t start_ns = common.start_time().seconds() * 1000000000 + common.start_time().nanos();
    windows_.Add((start_ns + ns) / 1000000, std::move(key), {1, in, out, static_cast<uint64_t>(ns)});
  }

  std::mutex mutex_;
  Windows windows_;
};

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::fprintf(stderr, "usage: sink PORT WINDOW_MS\n");
    return 2;
  }
  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &ends, nullptr);  // before any thread, so that all of them leave it to sigwait
  Sink sink(std::atoll(words[2]));
  grpc::ServerBuilder builder;
  builder.AddListeningPort(std::string("127.0.0.1:") + words[1], grpc::InsecureServerCredentials());
  builder.SetMaxReceiveMessageSize(64 << 20);
  builder.RegisterService(&sink);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (!server) return 1;
  std::puts("ready");
  std::fflush(stdout);
  int number = 0;
  sigwait(&ends, &number);
  server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
  sink.Print();
  return 0;
}
