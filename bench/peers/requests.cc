// Sends HTTP/1.1 requests over connections that stay open, as fast as they are answered or at a given rate.
//
//   requests PORT CONNECTIONS HOST PATH SECONDS RATE
//
// One request is under way on each connection; each has a thread. RATE is requests a second of all connections
// together; 0: as fast as they are answered. Prints one JSON object: requests answered with 200, other answers,
// and how long it took.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
std::atomic<uint64_t> answered{0}, others{0}, broken{0};

// Reads one whole answer, headers and Content-Length bytes behind them. False when the connection broke.
bool ReadAnswer(int socket, std::string& held, bool& ok) {
  char chunk[16384];
  size_t wanted = 0;
  for (;;) {
    const size_t end = held.find("\r\n\r\n");
    if (end != std::string::npos && wanted == 0) {
      const size_t length = held.find("content-length: ");
      wanted = end + 4 + (length < end ? std::strtoul(held.c_str() + length + 16, nullptr, 10) : 0);
    }
    if (wanted != 0 && held.size() >= wanted) {
      ok = held.compare(0, 12, "HTTP/1.1 200") == 0;
      held.erase(0, wanted);
      return true;
    }
    const ssize_t got = recv(socket, chunk, sizeof chunk, 0);
    if (got <= 0) return false;
    held.append(chunk, static_cast<size_t>(got));
  }
}

void Connection(int port, const std::string& request, Clock::time_point end, Clock::duration gap,
                Clock::time_point due) {
  const int made = socket(AF_INET, SOCK_STREAM, 0);
  const int on = 1;
  setsockopt(made, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
  std::string held;
  bool alive = connect(made, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  while (alive && Clock::now() < end) {
    if (gap.count() > 0) {
      std::this_thread::sleep_until(due);
      due += gap;
    }
    bool ok = false;
    alive = send(made, request.data(), request.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(request.size()) &&
            ReadAnswer(made, held, ok);
    if (alive) ++(ok ? answered : others);
  }
  if (!alive) ++broken;
  close(made);
}

}  // namespace

int main(int count, char** words) {
  if (count != 7) {
    std::fprintf(stderr, "usage: requests PORT CONNECTIONS HOST PATH SECONDS RATE\n");
    return 2;
  }
  const int connections = std::atoi(words[2]);
  const std::string request = std::string("GET ") + words[4] + " HTTP/1.1\r\nhost: " + words[3] +
                              "\r\nuser-agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Firefox/128.0\r\n\r\n";
  const double rate = std::atof(words[6]);
  const auto to_duration = [](double seconds) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  };
  const auto gap = to_duration(rate > 0 ? connections / rate : 0);
  const auto began = Clock::now();
  std::vector<std::thread> threads;
  for (int number = 0; number < connections; ++number)
    threads.emplace_back(Connection, std::atoi(words[1]), request, began + to_duration(std::atof(words[5])), gap,
                         began + gap * number / connections);
  for (std::thread& thread : threads) thread.join();
  std::printf("{\"requests\": %llu, \"others\": %llu, \"broken\": %llu, \"seconds\": %.6f}\n",
              (unsigned long long)answered, (unsigned long long)others, (unsigned long long)broken,
              std::chrono::duration<double>(Clock::now() - began).count());
  return broken != 0;
}
