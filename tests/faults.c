/* A disk that fails on purpose, for test_faults.py: preloaded into a process, it counts the calls that change
   files under one directory, and at the n-th kills the process or is full from then on. Below Python, so that
   it sees what libraries in other languages do too, and no product code has to know of it.

   cc -shared -fPIC -o faults.so faults.c -ldl */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FULL };
static char directory[PATH_MAX];
static long calls, fail_at;
static int how;

/* From now on counts, and fails at call `at` (from 1). */
void faults_arm(const char *where, long at, int kind) {
    snprintf(directory, sizeof directory, "%s", where);
    calls = 0, fail_at = at, how = kind;
}

__attribute__((constructor)) static void arm_from_environment(void) {
    const char *where = getenv("FAULTS_DIRECTORY"), *at = getenv("FAULTS_AT");
    if (where && at) faults_arm(where, atol(at), FULL);
}

long faults_calls(void) { return calls; }

static int is_inside(const char *path) {
    return directory[0] && !strncmp(path, directory, strlen(directory));
}

static int inside_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = directory[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (n < 0) return 0;
    path[n] = 0;
    return is_inside(path);
}

static int inside_at(int dirfd, const char *path) {
    return path[0] == '/' ? is_inside(path) : dirfd != AT_FDCWD && inside_fd(dirfd);
}

/* Counts a call. Kills here if its turn has come; otherwise says whether the disk is full for it. */
static int is_full(int needs_space) {
    long now = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (how == KILL && now == fail_at) kill(getpid(), SIGKILL);
    if (how == FULL && now >= fail_at && needs_space) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define GUARD(inside, needs_space) if ((inside) && is_full(needs_space)) return -1

#define OPEN(name)                                                                \
    int name(const char *path, int flags, ...) {                                  \
        va_list list;                                                             \
        va_start(list, flags);                                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;   \
        va_end(list);                                                             \
        GUARD((flags & O_CREAT) && inside_at(AT_FDCWD, path), 1);                 \
        return REAL(name)(path, flags, mode);                                     \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                              \
    int name(int dirfd, const char *path, int flags, ...) {                       \
        va_list list;                                                             \
        va_start(list, flags);                                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;   \
        va_end(list);                                                             \
        GUARD((flags & O_CREAT) && inside_at(dirfd, path), 1);                    \
        return REAL(name)(dirfd, path, flags, mode);                              \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t n) {
    if (!inside_fd(fd)) return REAL(write)(fd, data, n);
    if (how == KILL && calls + 1 == fail_at) REAL(write)(fd, data, n / 2); /* and killed in the midst of it */
    return is_full(1) ? -1 : REAL(write)(fd, data, n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    GUARD(inside_fd(fd), 1);
    return REAL(writev)(fd, parts, n);
}

/* Counted, but not waited for: a killed process loses nothing that it has written, only a power cut does. */
int fsync(int fd) {
    if (!inside_fd(fd)) return REAL(fsync)(fd);
    return is_full(1) ? -1 : 0;
}

int ftruncate64(int fd, off64_t length) {
    GUARD(inside_fd(fd), length > 0);
    return REAL(ftruncate64)(fd, length);
}

int rename(const char *from, const char *to) {
    GUARD(inside_at(AT_FDCWD, from), 1);
    return REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    GUARD(inside_at(AT_FDCWD, path), 1);
    return REAL(mkdir)(path, mode);
}

int chmod(const char *path, mode_t mode) {
    GUARD(inside_at(AT_FDCWD, path), 0);
    return REAL(chmod)(path, mode);
}

int unlink(const char *path) {
    GUARD(inside_at(AT_FDCWD, path), 0);
    return REAL(unlink)(path);
}

int unlinkat(int dirfd, const char *path, int flags) {
    GUARD(inside_at(dirfd, path), 0);
    return REAL(unlinkat)(dirfd, path, flags);
}

int rmdir(const char *path) {
    GUARD(inside_at(AT_FDCWD, path), 0);
    return REAL(rmdir)(path);
}
