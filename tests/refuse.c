/* A file system that lacks calls, for test_surroundings.py: preloaded into a process, it answers the calls named in
   REFUSE, such as "flock=38,fsync=22,chmod=1", with that errno. `fsync` is of directories only, `file_fsync` of files.

   cc -shared -fPIC -o refuse.so refuse.c -ldl */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REFUSE(name) if ((errno = refused(name))) return -1

static int refused(const char *call) {
    const char *at = getenv("REFUSE");
    size_t n = strlen(call);
    for (; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, call, n) && at[n] == '=') return atoi(at + n + 1);
    return 0;
}

int flock(int fd, int operation) {
    REFUSE("flock");
    return REAL(flock)(fd, operation);
}

int fsync(int fd) {
    struct stat facts;
    REFUSE(fstat(fd, &facts) == 0 && S_ISDIR(facts.st_mode) ? "fsync" : "file_fsync");
    return REAL(fsync)(fd);
}

int chmod(const char *path, mode_t mode) {
    REFUSE("chmod");
    return REAL(chmod)(path, mode);
}

int fchmod(int fd, mode_t mode) {
    REFUSE("chmod");
    return REAL(fchmod)(fd, mode);
}

int fchmodat(int fd, const char *path, mode_t mode, int flags) {
    REFUSE("chmod");
    return REAL(fchmodat)(fd, path, mode, flags);
}

int madvise(void *start, size_t n, int advice) {
    REFUSE("madvise");
    return REAL(madvise)(start, n, advice);
}
