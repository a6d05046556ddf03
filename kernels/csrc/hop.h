// What a stage does between the message that brings hidden states and the one that takes them on, without Python: a
// process that just woke runs code that is in no cache, and there the interpreter's takes longer than the messages.
#pragma once

#include <cstdint>

#include "layer.h"

namespace flexpipe {

struct Hop {
    // The message to wait for: num_expected bytes, the first num_head of which are head.
    const char* head;
    int64_t num_head;
    char* message;
    int64_t num_expected;
    const double* times;  // in the message, num_times of them; copied to the message to send
    int64_t num_times;
    // The layers to run on hidden, in place.
    const Layer* const* layers;
    float* const* kvs;
    int64_t num_layers;
    const Batch* batch;
    float* hidden;
    const float* rotary;
    int64_t num_rows;
    int64_t num_threads;
    // The message to send: beginning, hidden and end. Nothing is sent where beginning is null.
    char* beginning;
    int64_t num_beginning;
    double* sent_times;  // in beginning; one more than came: the seconds of this stage, seconds_before and seconds
    const char* end;
    int64_t num_end;
    double seconds_before;
    // File descriptors of sockets.
    int64_t connection;
    int64_t to;
    int64_t lingers;  // after the hop, wait until anything is ready
    // Results.
    int64_t num_received;  // 0 after the end of the connection, below 0 where there was nothing
    int64_t num_sent;      // below 0: an errno
    double seconds;        // from the message's arrival, or the beginning, to the end of the last layer
};

}  // namespace flexpipe
