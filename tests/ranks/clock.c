/* Preloaded, sets back the wall clock of the processes of one host, HVDTRAIN_TEST_CLOCK_HOST, by an hour once the file
   HVDTRAIN_TEST_CLOCK is there: for C++ and Python alike, both of which ask clock_gettime. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(clock, time);
  const char *file = getenv("HVDTRAIN_TEST_CLOCK"), *host = getenv("HVDTRAIN_TEST_CLOCK_HOST");
  const char *mine = getenv("HOROVOD_HOSTNAME");
  if (clock == CLOCK_REALTIME && file && host && mine && !strcmp(mine, host) && !access(file, F_OK))
    time->tv_sec -= 3600;
  return result;
}
