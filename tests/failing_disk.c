// Preloaded, makes chosen calls of open, opendir, read and write fail:
//   FAIL_CALLS  "open", "read", "write" or several; FAIL_PATH  part of the path; FAIL_ERRNO  the error
//   FAIL_FIRST  how many such calls pass before; FAIL_COUNT  how many fail
// fail_reset() begins to count anew, fail_hits() says how many have failed, fail_seen() how many there were.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int seen, hits;

void fail_reset(void) { seen = hits = 0; }
int fail_hits(void) { return hits; }
int fail_seen(void) { return seen; }

static int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

static int fails(const char *call, const char *path) {
  const char *calls = getenv("FAIL_CALLS"), *part = getenv("FAIL_PATH");
  if (!calls || !part || !path || !strstr(calls, call) || !strstr(path, part)) return 0;
  int now = __sync_fetch_and_add(&seen, 1), first = number("FAIL_FIRST", 0);
  if (now < first || now >= first + number("FAIL_COUNT", 1)) return 0;
  __sync_fetch_and_add(&hits, 1);
  errno = number("FAIL_ERRNO", EIO);
  return 1;
}

static int fd_fails(const char *call, int fd) {
  char link[64], path[4096];
  const char *calls = getenv("FAIL_CALLS");
  if (!calls || !strstr(calls, call)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fails(call, path);
}

#define REAL(type, name, ...)           \
  static type (*real)(__VA_ARGS__);     \
  if (!real) real = dlsym(RTLD_NEXT, #name)
#define OPEN(name)                                                           \
  int name(const char *path, int flags, ...) {                               \
    REAL(int, name, const char *, int, ...);                                 \
    va_list rest;                                                            \
    va_start(rest, flags);                                                   \
    int mode = va_arg(rest, int);                                            \
    va_end(rest);                                                            \
    return fails("open", path) ? -1 : real(path, flags, mode);               \
  }
#define OPENAT(name)                                                         \
  int name(int folder, const char *path, int flags, ...) {                   \
    REAL(int, name, int, const char *, int, ...);                            \
    va_list rest;                                                            \
    va_start(rest, flags);                                                   \
    int mode = va_arg(rest, int);                                            \
    va_end(rest);                                                            \
    return fails("open", path) ? -1 : real(folder, path, flags, mode);       \
  }
#define PREAD(name, offset)                                                  \
  ssize_t name(int fd, void *buffer, size_t size, offset at) {               \
    REAL(ssize_t, name, int, void *, size_t, offset);                        \
    return fd_fails("read", fd) ? -1 : real(fd, buffer, size, at);                 \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
PREAD(pread, off_t)
PREAD(pread64, off64_t)

ssize_t read(int fd, void *buffer, size_t size) {
  REAL(ssize_t, read, int, void *, size_t);
  return fd_fails("read", fd) ? -1 : real(fd, buffer, size);
}

ssize_t write(int fd, const void *buffer, size_t size) {
  REAL(ssize_t, write, int, const void *, size_t);
  return fd_fails("write", fd) ? -1 : real(fd, buffer, size);
}

DIR *opendir(const char *path) {
  REAL(DIR *, opendir, const char *);
  return fails("open", path) ? NULL : real(path);
}
