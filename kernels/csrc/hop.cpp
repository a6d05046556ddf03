#include "hop.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "parallel.h"

namespace flexpipe {
namespace {

using Clock = std::chrono::steady_clock;

void run(Hop& hop, Clock::time_point started) {
    for (int64_t i = 0; i < hop.num_layers; ++i) {
        forward(*hop.layers[i], *hop.batch, hop.hidden, hop.rotary, hop.kvs[i], hop.num_rows, int(hop.num_threads));
    }
    hop.seconds = std::chrono::duration<double>(Clock::now() - started).count();
    if (!hop.beginning) return;
    // Before the next stage looks for a core for its own helpers: while these spin there is none, and its helpers would
    // wait behind its caller for the length of some layers.
    rest_helpers();
    std::copy(hop.times, hop.times + hop.num_times, hop.sent_times);
    hop.sent_times[hop.num_times] = hop.seconds_before + hop.seconds;
    iovec pieces[3] = {{hop.beginning, size_t(hop.num_beginning)},
                       {hop.hidden, size_t(hop.num_rows * hop.layers[0]->qkv.num_inputs) * sizeof(float)},
                       {const_cast<char*>(hop.end), size_t(hop.num_end)}};
    msghdr message = {};
    message.msg_iov = pieces;
    message.msg_iovlen = 3;
    do {
        hop.num_sent = sendmsg(int(hop.to), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (hop.num_sent < 0 && errno == EINTR);
    if (hop.num_sent < 0) hop.num_sent = -errno;
}

}  // namespace
}  // namespace flexpipe

extern "C" {

// Waits until one of an epoll's descriptors is ready, at most timeout_ms. If there is a message on hop.connection and it is
// the expected one, runs the hop, and with hop.lingers waits again: what the caller does afterwards would take time from
// the stage that has the step now. Returns 0: nothing was read; 1: hop.num_received bytes of something else were read
// into message; 2: done.
int flexpipe_await_hop(flexpipe::Hop* hop, int epoll, int timeout_ms) {
    constexpr int kMaxEvents = 16;
    epoll_event events[kMaxEvents];
    const int num_events = epoll_wait(epoll, events, kMaxEvents, timeout_ms);
    if (std::none_of(events, events + std::max(num_events, 0),
                     [&](const epoll_event& event) { return event.data.fd == hop->connection; })) {
        return 0;
    }
    const auto started = flexpipe::Clock::now();
    hop->num_received = recv(int(hop->connection), hop->message, size_t(hop->num_expected), MSG_DONTWAIT);
    if (hop->num_received <= 0) return 1;
    if (hop->num_received < hop->num_expected || std::memcmp(hop->message, hop->head, size_t(hop->num_head)) != 0) {
        return 1;
    }
    flexpipe::run(*hop, started);
    if (hop->lingers) epoll_wait(epoll, events, kMaxEvents, timeout_ms);
    return 2;
}

// Runs a hop that waits for no message.
void flexpipe_run_hop(flexpipe::Hop* hop) { flexpipe::run(*hop, flexpipe::Clock::now()); }
}
