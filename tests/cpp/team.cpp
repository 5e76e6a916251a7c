// The part of OpenMP's runtime that GCC's code of csrc/ calls, made of threads that a sanitizer sees. libgomp's own begin, wait for each
// other and end by system calls that ThreadSanitizer does not know, and every loop would count as a race. The kernels themselves are
// compiled as always, with -fopenmp; only this file takes libgomp's place.
#include <pthread.h>

#include <vector>

namespace {

constexpr unsigned THREADS = 3;  // of a parallel region, also on a machine of one core

struct Team {
  unsigned size;
  pthread_barrier_t barrier;
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  bool begun = false;  // of the loop whose iterations are handed out
  long next = 0, end = 0, chunk = 1;
};

struct Member {
  Team* team;
  unsigned number;
  void (*work)(void*);
  void* data;
};

thread_local Member member = {nullptr, 0, nullptr, nullptr};

void* begin(void* one) {
  member = *static_cast<Member*>(one);
  member.work(member.data);
  return nullptr;
}

}  // namespace

extern "C" {

int omp_get_num_threads() { return member.team ? int(member.team->size) : 1; }
int omp_get_thread_num() { return int(member.number); }
int omp_get_max_threads() { return int(THREADS); }

void GOMP_parallel(void (*work)(void*), void* data, unsigned wanted, unsigned) {
  Team team{};
  team.size = wanted ? wanted : THREADS;  // 1 where the region's `if` is false
  pthread_barrier_init(&team.barrier, nullptr, team.size);
  std::vector<Member> members;
  for (unsigned number = 0; number < team.size; ++number) members.push_back({&team, number, work, data});
  std::vector<pthread_t> threads(team.size);
  for (unsigned number = 1; number < team.size; ++number) pthread_create(&threads[number], nullptr, begin, &members[number]);
  const Member before = member;
  begin(&members[0]);
  member = before;
  for (unsigned number = 1; number < team.size; ++number) pthread_join(threads[number], nullptr);
  pthread_barrier_destroy(&team.barrier);
}

void GOMP_barrier() { pthread_barrier_wait(&member.team->barrier); }

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  Team& team = *member.team;
  pthread_mutex_lock(&team.lock);
  *first = team.next;
  *last = team.next = team.end - team.next > team.chunk ? team.next + team.chunk : team.end;
  pthread_mutex_unlock(&team.lock);
  return *first < *last;
}

// One such loop in a region; the step is 1 in all of csrc/.
bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long, long chunk, long* begin, long* end) {
  Team& team = *member.team;
  pthread_mutex_lock(&team.lock);
  if (!team.begun) team.begun = true, team.next = first, team.end = last, team.chunk = chunk;
  pthread_mutex_unlock(&team.lock);
  return GOMP_loop_nonmonotonic_dynamic_next(begin, end);
}

void GOMP_loop_end_nowait() {}

}  // extern "C"
