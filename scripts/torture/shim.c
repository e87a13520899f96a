// LD_PRELOAD: lets operations on files whose path contains $FAULT_MATCH fail, ends the process at one of them, or records them.
//   FAULT_K=k        the k-th matching operation (from 1); 0: only count
//   FAULT_OPS=a,b    the kinds that count: open openread read write fsync fsyncdir rename unlink mkdir trunc; none: all that write
//   FAULT_MODE       errno (the default) | kill (SIGKILL before the operation) | short (every write is cut to half)
//   FAULT_ERRNO=28   the errno given
//   FAULT_STICKY=1   every matching operation from the k-th on fails
//   FAULT_ROOM=n     writes fit until n bytes have been written, then there is no space left
//   FAULT_COUNT=file the number of matching operations is written there at the end
//   FAULT_REC=prefix every operation is recorded: prefix.log (tab separated) and prefix.blob (what was written)
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *match, *kinds, *mode = "errno", *count_file;
static long k, n_matched, room = -1;
static int error = ENOSPC, sticky, ready;
static int log_fd = -1, blob_fd = -1;
static off_t blob_end;
static pthread_mutex_t recording = PTHREAD_MUTEX_INITIALIZER;

static int create(const char *prefix, const char *suffix) {
  char path[PATH_MAX];
  snprintf(path, sizeof path, "%s%s", prefix, suffix);
  return syscall(SYS_openat, AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
}

__attribute__((constructor)) static void begin(void) {
  match = getenv("FAULT_MATCH");
  kinds = getenv("FAULT_OPS");
  count_file = getenv("FAULT_COUNT");
  if (getenv("FAULT_MODE")) mode = getenv("FAULT_MODE");
  if (getenv("FAULT_K")) k = atol(getenv("FAULT_K"));
  if (getenv("FAULT_ERRNO")) error = atoi(getenv("FAULT_ERRNO"));
  if (getenv("FAULT_ROOM")) room = atol(getenv("FAULT_ROOM"));
  sticky = getenv("FAULT_STICKY") != 0;
  if (getenv("FAULT_REC")) {
    log_fd = create(getenv("FAULT_REC"), ".log");
    blob_fd = create(getenv("FAULT_REC"), ".blob");
  }
  ready = match != 0;
}

static void put_count(void) {
  if (!count_file) return;
  int fd = syscall(SYS_openat, AT_FDCWD, count_file, O_CREAT | O_WRONLY | O_TRUNC, 0644);
  char text[32];
  int len = snprintf(text, sizeof text, "%ld", n_matched);
  syscall(SYS_write, fd, text, len);
  syscall(SYS_close, fd);
}

__attribute__((destructor)) static void end(void) {
  if (ready) put_count();
}

// Whether operations of this kind count.
static int counts(const char *kind) {
  if (!kinds) return strcmp(kind, "read") && strcmp(kind, "openread") && strcmp(kind, "fsyncdir");
  size_t len = strlen(kind);
  for (const char *at = strstr(kinds, kind); at; at = strstr(at + 1, kind))
    if ((at == kinds || at[-1] == ',') && (at[len] == 0 || at[len] == ',')) return 1;
  return 0;
}

static int path_of(int fd, char *out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t len = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
  if (len < 0) return 0;
  out[len] = 0;
  return 1;
}

static int matches(int fd, char *path) { return ready && path_of(fd, path) && strstr(path, match); }

static void absolute(int dir_fd, const char *path, char *out) {
  char dir[PATH_MAX] = "";
  if (path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
    return;
  }
  if (dir_fd == AT_FDCWD) {
    if (!getcwd(dir, sizeof dir)) dir[0] = 0;
  } else {
    path_of(dir_fd, dir);
  }
  snprintf(out, PATH_MAX, "%.2000s/%.2000s", dir, path);
}

static void record(const char *kind, const char *path, const char *argument) {
  if (log_fd < 0) return;
  char line[3 * PATH_MAX];
  int len = snprintf(line, sizeof line, "%s\t%s\t%s\n", kind, path, argument);
  syscall(SYS_write, log_fd, line, len);
}

// 0: go on; -1: fail, with errno set.
static int struck(const char *kind, const char *path) {
  if (!ready || !strstr(path, match) || !counts(kind)) return 0;
  long mine = __sync_add_and_fetch(&n_matched, 1);
  if (k == 0 || !(mine == k || (sticky && mine > k))) return 0;
  if (!strcmp(mode, "kill")) {
    put_count();
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
  }
  if (strcmp(mode, "errno")) return 0;
  errno = error;
  return -1;
}

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

static int do_open(int dir_fd, const char *path, int flags, mode_t permissions) {
  char full[PATH_MAX];
  absolute(dir_fd, path, full);
  if (struck(writes(flags) ? "open" : "openread", full)) return -1;
  int recorded = ready && log_fd >= 0 && writes(flags) && strstr(full, match);
  struct stat before;
  int is_new = recorded && fstatat(AT_FDCWD, full, &before, 0) != 0;
  int fd = syscall(SYS_openat, dir_fd, path, flags | O_LARGEFILE, permissions);
  if (fd >= 0 && is_new) record("create", full, "");
  if (fd >= 0 && recorded && !is_new && (flags & O_TRUNC)) record("trunc", full, "0");
  return fd;
}
#define PERMISSIONS(flags)                   \
  mode_t permissions = 0;                    \
  if ((flags) & (O_CREAT | O_TMPFILE)) {     \
    va_list rest;                            \
    va_start(rest, flags);                   \
    permissions = va_arg(rest, mode_t);      \
    va_end(rest);                            \
  }
int open(const char *path, int flags, ...) { PERMISSIONS(flags) return do_open(AT_FDCWD, path, flags, permissions); }
int open64(const char *path, int flags, ...) { PERMISSIONS(flags) return do_open(AT_FDCWD, path, flags, permissions); }
int openat(int dir, const char *path, int flags, ...) { PERMISSIONS(flags) return do_open(dir, path, flags, permissions); }
int openat64(int dir, const char *path, int flags, ...) { PERMISSIONS(flags) return do_open(dir, path, flags, permissions); }
int creat(const char *path, mode_t permissions) { return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, permissions); }

static void record_write(int fd, const char *path, const void *bytes, ssize_t len, off_t at) {
  (void)fd;
  if (log_fd < 0 || len <= 0) return;
  char argument[128];
  pthread_mutex_lock(&recording);
  snprintf(argument, sizeof argument, "%lld %lld %lld", (long long)at, (long long)len, (long long)blob_end);
  syscall(SYS_write, blob_fd, bytes, len);
  blob_end += len;
  record("write", path, argument);
  pthread_mutex_unlock(&recording);
}

// How much of a write fits; -1 with errno set: nothing.
static ssize_t fits(size_t len) {
  if (!strcmp(mode, "short") && len > 1) return (len + 1) / 2;
  if (room < 0 || len == 0) return len;
  if (room == 0) {
    errno = ENOSPC;
    return -1;
  }
  ssize_t part = (long)len < room ? (long)len : room;
  room -= part;
  return part;
}

ssize_t write(int fd, const void *bytes, size_t len) {
  char path[PATH_MAX];
  if (!matches(fd, path)) return syscall(SYS_write, fd, bytes, len);
  if (struck("write", path)) return -1;
  ssize_t part = fits(len);
  if (part < 0) return -1;
  off_t at = 0;
  if (log_fd >= 0) {
    struct stat now;
    at = (fcntl(fd, F_GETFL) & O_APPEND) ? (fstat(fd, &now), now.st_size) : lseek(fd, 0, SEEK_CUR);
  }
  ssize_t written = syscall(SYS_write, fd, bytes, part);
  record_write(fd, path, bytes, written, at);
  return written;
}
ssize_t writev(int fd, const struct iovec *parts, int n_parts) {
  char path[PATH_MAX];
  if (!matches(fd, path)) return syscall(SYS_writev, fd, parts, n_parts);
  if (n_parts <= 0) return 0;
  int first = 0;
  while (first < n_parts - 1 && parts[first].iov_len == 0) first++;
  return write(fd, parts[first].iov_base, parts[first].iov_len);
}
ssize_t pwrite64(int fd, const void *bytes, size_t len, off_t at) {
  char path[PATH_MAX];
  if (!matches(fd, path)) return syscall(SYS_pwrite64, fd, bytes, len, at);
  if (struck("write", path)) return -1;
  ssize_t part = fits(len);
  if (part < 0) return -1;
  ssize_t written = syscall(SYS_pwrite64, fd, bytes, part, at);
  record_write(fd, path, bytes, written, at);
  return written;
}
ssize_t pwrite(int fd, const void *bytes, size_t len, off_t at) { return pwrite64(fd, bytes, len, at); }

// Copies within the kernel are sent back to read and write, which are seen.
ssize_t copy_file_range(int in, off_t *in_at, int out, off_t *out_at, size_t len, unsigned flags) {
  char path[PATH_MAX];
  if (matches(out, path)) {
    errno = ENOSYS;
    return -1;
  }
  return syscall(SYS_copy_file_range, in, in_at, out, out_at, len, flags);
}
ssize_t sendfile64(int out, int in, off_t *at, size_t len) {
  char path[PATH_MAX];
  if (matches(out, path)) {
    errno = ENOSYS;
    return -1;
  }
  return syscall(SYS_sendfile, out, in, at, len);
}
ssize_t sendfile(int out, int in, off_t *at, size_t len) { return sendfile64(out, in, at, len); }

static int do_sync(int fd, int is_data) {
  char path[PATH_MAX];
  if (matches(fd, path)) {
    struct stat now;
    if (struck("fsync", path) || (fstat(fd, &now) == 0 && S_ISDIR(now.st_mode) && struck("fsyncdir", path))) return -1;
    record("fsync", path, "");
  }
  return syscall(is_data ? SYS_fdatasync : SYS_fsync, fd);
}
int fsync(int fd) { return do_sync(fd, 0); }
int fdatasync(int fd) { return do_sync(fd, 1); }

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
  char old[PATH_MAX], new[PATH_MAX];
  absolute(from_dir, from, old);
  absolute(to_dir, to, new);
  if (struck("rename", new)) return -1;
  int failed = syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
  if (!failed && ready && strstr(new, match)) record("rename", old, new);
  return failed;
}
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_dir, const char *from, int to_dir, const char *to) { return renameat2(from_dir, from, to_dir, to, 0); }

int unlinkat(int dir, const char *path, int flags) {
  char full[PATH_MAX];
  absolute(dir, path, full);
  if (struck("unlink", full)) return -1;
  int failed = syscall(SYS_unlinkat, dir, path, flags);
  if (!failed && ready && strstr(full, match)) record(flags & AT_REMOVEDIR ? "rmdir" : "unlink", full, "");
  return failed;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dir, const char *path, mode_t permissions) {
  char full[PATH_MAX];
  absolute(dir, path, full);
  if (struck("mkdir", full)) return -1;
  int failed = syscall(SYS_mkdirat, dir, path, permissions);
  if (!failed && ready && strstr(full, match)) record("mkdir", full, "");
  return failed;
}
int mkdir(const char *path, mode_t permissions) { return mkdirat(AT_FDCWD, path, permissions); }

int ftruncate64(int fd, off_t len) {
  char path[PATH_MAX];
  if (matches(fd, path)) {
    if (struck("trunc", path)) return -1;
    char argument[32];
    snprintf(argument, sizeof argument, "%lld", (long long)len);
    record("trunc", path, argument);
  }
  return syscall(SYS_ftruncate, fd, len);
}
int ftruncate(int fd, off_t len) { return ftruncate64(fd, len); }

// Whether reading from this file fails.
static int read_struck(int fd) {
  char path[PATH_MAX];
  return ready && kinds && counts("read") && path_of(fd, path) && struck("read", path);
}
ssize_t read(int fd, void *bytes, size_t len) { return read_struck(fd) ? -1 : syscall(SYS_read, fd, bytes, len); }
ssize_t pread64(int fd, void *bytes, size_t len, off_t at) {
  return read_struck(fd) ? -1 : syscall(SYS_pread64, fd, bytes, len, at);
}
ssize_t pread(int fd, void *bytes, size_t len, off_t at) { return pread64(fd, bytes, len, at); }
