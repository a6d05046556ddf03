// A pool of helper threads that nobody waits for unless they have begun a task.
//
// The caller of an OpenMP region waits at its end for every thread, also for one that another process has pushed off
// its core and that did nothing. Here the caller takes tasks like any helper, and waits only for tasks that a helper
// has begun: with busy cores a step then takes as long as it would on the cores it gets.
#pragma once

#include <cstdint>

namespace flexpipe {

using Task = void (*)(void* context, int64_t index);

// Runs task(context, i) for each i < num_tasks on at most num_threads threads, the caller's included. What tasks write
// is visible to the caller afterwards. Callers in other threads run at the same time, without helpers.
void run_tasks(Task task, void* context, int64_t num_tasks, int num_threads);

// Lets the helpers sleep at once instead of looking for another job: the cores are for somebody else now.
void rest_helpers();

template <typename Body>
void parallel_for(int64_t num_tasks, int num_threads, Body&& body) {
    run_tasks([](void* context, int64_t index) { (*static_cast<Body*>(context))(index); }, &body, num_tasks,
              num_threads);
}

}  // namespace flexpipe
