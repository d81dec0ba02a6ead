/* Ends a process at one of its calls that change what is below a folder.

   Preloaded, it sees the calls of Python and of C++ libraries alike. MOECC_KILL_BELOW names the
   folder and MOECC_KILL_AT the call, from 0; what that call writes is written by half. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

/* How many calls there were, the one that ended the process not counted. */
long moecc_storage_calls(void) { return atomic_load(&calls); }

static int is_below(const char *path) {
  const char *folder = getenv("MOECC_KILL_BELOW");
  return folder && *folder && strncmp(path, folder, strlen(folder)) == 0;
}

static int names_below(int folder, const char *path) {
  char link[64], whole[8192];
  if (path[0] == '/') return is_below(path);
  if (folder == AT_FDCWD)
    snprintf(link, sizeof link, "/proc/self/cwd");
  else
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
  ssize_t length = readlink(link, whole, 4096);
  if (length < 0) return 0;
  snprintf(whole + length, sizeof whole - length, "/%s", path);
  return is_below(whole);
}

static int opened_below(int descriptor) {
  char link[64], path[4097];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, 4096);
  if (length < 0) return 0;
  path[length] = 0;
  return is_below(path);
}

/* Count a call; return whether it is the last one of this process. */
static int is_last(int counts) {
  if (!counts) return 0;
  const char *at = getenv("MOECC_KILL_AT");
  long number = atomic_fetch_add(&calls, 1);
  if (!at || !*at || number < atol(at)) return 0;
  while (number > atol(at)) pause(); /* a thread that comes after the end changes nothing */
  return 1;
}

static void end(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

#define NEXT(name) \
  static __typeof__(name) *next; \
  if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define ENDS(counts) \
  do { \
    if (is_last(counts)) end(); \
  } while (0)

#define OPEN(name, folder, arguments, parameters) \
  int name parameters { \
    NEXT(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list more; \
      va_start(more, flags); \
      mode = va_arg(more, mode_t); \
      va_end(more); \
    } \
    ENDS((flags & (O_CREAT | O_TRUNC)) && names_below(folder, path)); \
    return next arguments; \
  }
OPEN(open, AT_FDCWD, (path, flags, mode), (const char *path, int flags, ...))
OPEN(open64, AT_FDCWD, (path, flags, mode), (const char *path, int flags, ...))
OPEN(openat, folder, (folder, path, flags, mode), (int folder, const char *path, int flags, ...))
OPEN(openat64, folder, (folder, path, flags, mode), (int folder, const char *path, int flags, ...))

#define NAME(type, name, folder, arguments, parameters) \
  type name parameters { \
    NEXT(name); \
    ENDS(names_below(folder, path)); \
    return next arguments; \
  }
NAME(int, mkdir, AT_FDCWD, (path, mode), (const char *path, mode_t mode))
NAME(int, mkdirat, folder, (folder, path, mode), (int folder, const char *path, mode_t mode))
NAME(int, rmdir, AT_FDCWD, (path), (const char *path))
NAME(int, unlink, AT_FDCWD, (path), (const char *path))
NAME(int, unlinkat, folder, (folder, path, flags), (int folder, const char *path, int flags))
NAME(int, rename, AT_FDCWD, (path, to), (const char *path, const char *to))
NAME(int, renameat, folder, (folder, path, in, to),
     (int folder, const char *path, int in, const char *to))
NAME(int, renameat2, folder, (folder, path, in, to, flags),
     (int folder, const char *path, int in, const char *to, unsigned flags))
NAME(int, link, AT_FDCWD, (path, to), (const char *path, const char *to))
NAME(int, linkat, folder, (folder, path, in, to, flags),
     (int folder, const char *path, int in, const char *to, int flags))
NAME(int, truncate, AT_FDCWD, (path, size), (const char *path, off_t size))

#define DESCRIPTOR(type, name, arguments, parameters, half) \
  type name parameters { \
    NEXT(name); \
    if (is_last(opened_below(descriptor))) { \
      half; \
      end(); \
    } \
    return next arguments; \
  }
DESCRIPTOR(int, fsync, (descriptor), (int descriptor), )
DESCRIPTOR(int, fdatasync, (descriptor), (int descriptor), )
DESCRIPTOR(int, ftruncate, (descriptor, size), (int descriptor, off_t size), )
DESCRIPTOR(int, ftruncate64, (descriptor, size), (int descriptor, off64_t size), )
DESCRIPTOR(ssize_t, write, (descriptor, data, size),
           (int descriptor, const void *data, size_t size), next(descriptor, data, size / 2))
DESCRIPTOR(ssize_t, pwrite, (descriptor, data, size, offset),
           (int descriptor, const void *data, size_t size, off_t offset),
           next(descriptor, data, size / 2, offset))
DESCRIPTOR(ssize_t, pwrite64, (descriptor, data, size, offset),
           (int descriptor, const void *data, size_t size, off64_t offset),
           next(descriptor, data, size / 2, offset))
DESCRIPTOR(ssize_t, writev, (descriptor, parts, count),
           (int descriptor, const struct iovec *parts, int count),
           next(descriptor, parts, count / 2))
DESCRIPTOR(ssize_t, pwritev, (descriptor, parts, count, offset),
           (int descriptor, const struct iovec *parts, int count, off_t offset), )
DESCRIPTOR(ssize_t, sendfile, (descriptor, from, offset, size),
           (int descriptor, int from, off_t *offset, size_t size),
           next(descriptor, from, offset, size / 2))
DESCRIPTOR(ssize_t, sendfile64, (descriptor, from, offset, size),
           (int descriptor, int from, off64_t *offset, size_t size),
           next(descriptor, from, offset, size / 2))

ssize_t copy_file_range(int from, off64_t *start, int descriptor, off64_t *offset, size_t size,
                        unsigned flags) {
  NEXT(copy_file_range);
  if (is_last(opened_below(descriptor))) {
    next(from, start, descriptor, offset, size / 2, flags);
    end();
  }
  return next(from, start, descriptor, offset, size, flags);
}
