// Threads that go through a pass together.
#pragma once

#include <cstddef>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace tulle {

// work(thread, team) on up to `threads` threads at once, which may wait() for each other.
template <typename Work>
void in_team(std::size_t threads, const Work& work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(threads))
  work(static_cast<std::size_t>(omp_get_thread_num()), static_cast<std::size_t>(omp_get_num_threads()));
#else
  static_cast<void>(threads);
  work(std::size_t{0}, std::size_t{1});
#endif
}

// Of the calling thread within its team.
inline std::size_t thread_number() {
#if defined(_OPENMP)
  return static_cast<std::size_t>(omp_get_thread_num());
#else
  return 0;
#endif
}

// Until all of the team are here.
inline void wait() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
}

}  // namespace tulle
