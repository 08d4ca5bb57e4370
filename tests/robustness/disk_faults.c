/* Makes one disk operation of a process fail, or ends the process there. Loaded with LD_PRELOAD by disk_faults.py.

   Counts calls that concern files below one folder. What is to fail is read from a file of 1,024 bytes that KD_DISK_FAULTS names and
   that all processes map, so that forked processes and threads share the count. */

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
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define KILL -1

struct control {
    long count;    /* calls so far */
    long target;   /* the call that fails, from 1; 0: none */
    int error;     /* its errno, or KILL */
    int lasts;     /* whether the disk stays like this afterwards: full for ENOSPC, read-only for EROFS */
    int reads;     /* count calls that read, and only those */
    int fired;     /* whether the call was reached */
    char folder[480];
    char what[512]; /* the call that failed and its path */
};

enum kind { READ, WRITE, CREATE, OPEN_TO_WRITE, CHANGE_ENTRY, OTHER };

static struct control *shared;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("KD_DISK_FAULTS");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    shared = mapped == MAP_FAILED ? NULL : mapped;
}

static void *original(const char *name) { return dlsym(RTLD_NEXT, name); }
#define CALL(name) ({ static void *found; if (!found) found = original(#name); (__typeof__(&name))found; })

static int is_below(const char *path) {
    size_t length = strlen(shared->folder);
    return length && strncmp(path, shared->folder, length) == 0 && (path[length] == '/' || !path[length]);
}

static int path_of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

/* Whether a path, relative to a folder's descriptor, lies below our folder. */
static int concerns(int folder, const char *path, char *whole) {
    if (!shared || !shared->folder[0] || !path) return 0;
    if (path[0] == '/') {
        snprintf(whole, PATH_MAX, "%s", path);
    } else {
        char base[PATH_MAX];
        if (folder == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of_descriptor(folder, base)) return 0;
        if (snprintf(whole, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    }
    return is_below(whole);
}

static int concerns_file(int descriptor, char *whole) {
    return shared && shared->folder[0] && path_of_descriptor(descriptor, whole) && is_below(whole);
}

/* Counts a call; the errno with which it must fail, or 0. KILL does not return. */
static int fault(enum kind kind, const char *name, const char *path) {
    int saved = errno;
    if (!shared || (kind == READ) != shared->reads) return 0;
    long number = __sync_add_and_fetch(&shared->count, 1);
    if (!shared->target || number < shared->target) return 0;
    if (number > shared->target) {
        if (!shared->lasts) return 0;
        int takes_room = kind == WRITE || kind == CREATE;
        int changes = takes_room || kind == OPEN_TO_WRITE || kind == CHANGE_ENTRY;
        errno = saved;
        return (shared->error == ENOSPC ? takes_room : changes) ? shared->error : 0;
    }
    shared->fired = 1;
    snprintf(shared->what, sizeof shared->what, "%s %s", name, path);
    if (shared->error == KILL) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = saved;
    return shared->error;
}

#define FAIL_IF(condition, kind, name, path, result) \
    if (condition) { int number = fault(kind, name, path); if (number) { errno = number; return result; } }

/* -- Opening ------------------------------------------------------------------------------------------------------- */

static enum kind kind_of_opening(int flags, const char *path) {
    if (flags & O_CREAT && access(path, F_OK) != 0) return CREATE;
    return (flags & O_ACCMODE) == O_RDONLY ? READ : OPEN_TO_WRITE;
}

#define OPENING(name, folder, call) \
    va_list rest; mode_t mode = 0; char whole[PATH_MAX]; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
    FAIL_IF(concerns(folder, path, whole), kind_of_opening(flags, whole), name, whole, -1) \
    return call;

int open(const char *path, int flags, ...) { OPENING("open", AT_FDCWD, CALL(open)(path, flags, mode)) }
int open64(const char *path, int flags, ...) { OPENING("open", AT_FDCWD, CALL(open64)(path, flags, mode)) }
int openat(int folder, const char *path, int flags, ...) { OPENING("open", folder, CALL(openat)(folder, path, flags, mode)) }
int openat64(int folder, const char *path, int flags, ...) { OPENING("open", folder, CALL(openat64)(folder, path, flags, mode)) }

#define STREAM(name) \
    char whole[PATH_MAX]; int flags = strchr(mode, 'r') && !strchr(mode, '+') ? O_RDONLY : O_WRONLY | (strchr(mode, 'r') ? 0 : O_CREAT); \
    FAIL_IF(concerns(AT_FDCWD, path, whole), kind_of_opening(flags, whole), "fopen", whole, NULL) \
    return CALL(name)(path, mode);

FILE *fopen(const char *path, const char *mode) { STREAM(fopen) }
FILE *fopen64(const char *path, const char *mode) { STREAM(fopen64) }

/* -- Reading and writing ------------------------------------------------------------------------------------------- */

#define FILE_CALL(kind, name, call) char whole[PATH_MAX]; FAIL_IF(concerns_file(file, whole), kind, name, whole, -1) return call;

ssize_t read(int file, void *to, size_t size) { FILE_CALL(READ, "read", CALL(read)(file, to, size)) }
ssize_t pread(int file, void *to, size_t size, off_t at) { FILE_CALL(READ, "pread", CALL(pread)(file, to, size, at)) }
ssize_t pread64(int file, void *to, size_t size, off64_t at) { FILE_CALL(READ, "pread", CALL(pread64)(file, to, size, at)) }
ssize_t preadv(int file, const struct iovec *to, int count, off_t at) { FILE_CALL(READ, "preadv", CALL(preadv)(file, to, count, at)) }
ssize_t preadv64(int file, const struct iovec *to, int count, off64_t at) { FILE_CALL(READ, "preadv", CALL(preadv64)(file, to, count, at)) }

/* A disk that is full, or a process that is killed, leaves half of what was to be written. */
#define WRITING(name, half, call) \
    char whole[PATH_MAX]; \
    if (concerns_file(file, whole)) { \
        int next = shared->target == shared->count + 1 && !shared->reads; \
        if (next && size > 1 && (shared->error == KILL || shared->error == ENOSPC)) half; \
        FAIL_IF(1, WRITE, name, whole, -1) \
    } \
    return call;

ssize_t write(int file, const void *from, size_t size) {
    WRITING("write", if (CALL(write)(file, from, size / 2) < 0) return -1, CALL(write)(file, from, size))
}
ssize_t pwrite(int file, const void *from, size_t size, off_t at) {
    WRITING("pwrite", if (CALL(pwrite)(file, from, size / 2, at) < 0) return -1, CALL(pwrite)(file, from, size, at))
}
ssize_t pwrite64(int file, const void *from, size_t size, off64_t at) {
    WRITING("pwrite", if (CALL(pwrite64)(file, from, size / 2, at) < 0) return -1, CALL(pwrite64)(file, from, size, at))
}
ssize_t writev(int file, const struct iovec *from, int count) { FILE_CALL(WRITE, "writev", CALL(writev)(file, from, count)) }
ssize_t pwritev(int file, const struct iovec *from, int count, off_t at) { FILE_CALL(WRITE, "pwritev", CALL(pwritev)(file, from, count, at)) }
ssize_t pwritev64(int file, const struct iovec *from, int count, off64_t at) { FILE_CALL(WRITE, "pwritev", CALL(pwritev64)(file, from, count, at)) }

int ftruncate(int file, off_t size) { FILE_CALL(WRITE, "ftruncate", CALL(ftruncate)(file, size)) }
int ftruncate64(int file, off64_t size) { FILE_CALL(WRITE, "ftruncate", CALL(ftruncate64)(file, size)) }
int fsync(int file) { FILE_CALL(OTHER, "fsync", CALL(fsync)(file)) }
int fdatasync(int file) { FILE_CALL(OTHER, "fdatasync", CALL(fdatasync)(file)) }

int posix_fallocate(int file, off_t at, off_t size) {
    char whole[PATH_MAX];
    int number = concerns_file(file, whole) ? fault(WRITE, "fallocate", whole) : 0;
    return number ? number : CALL(posix_fallocate)(file, at, size);
}
int posix_fallocate64(int file, off64_t at, off64_t size) {
    char whole[PATH_MAX];
    int number = concerns_file(file, whole) ? fault(WRITE, "fallocate", whole) : 0;
    return number ? number : CALL(posix_fallocate64)(file, at, size);
}
int close(int file) {
    char whole[PATH_MAX];
    /* Only of files that were open for writing: closing others has nothing left to report. */
    int number = 0;
    if (shared && (fcntl(file, F_GETFL) & O_ACCMODE) != O_RDONLY && concerns_file(file, whole)) number = fault(OTHER, "close", whole);
    int result = CALL(close)(file);
    if (number) { errno = number; return -1; }
    return result;
}

/* -- Folders ------------------------------------------------------------------------------------------------------- */

#define PATH_CALL(kind, name, folder, path, call) \
    char whole[PATH_MAX]; FAIL_IF(concerns(folder, path, whole), kind, name, whole, -1) return call;

int mkdir(const char *path, mode_t mode) { PATH_CALL(CREATE, "mkdir", AT_FDCWD, path, CALL(mkdir)(path, mode)) }
int mkdirat(int folder, const char *path, mode_t mode) { PATH_CALL(CREATE, "mkdir", folder, path, CALL(mkdirat)(folder, path, mode)) }
int rmdir(const char *path) { PATH_CALL(CHANGE_ENTRY, "rmdir", AT_FDCWD, path, CALL(rmdir)(path)) }
int unlink(const char *path) { PATH_CALL(CHANGE_ENTRY, "unlink", AT_FDCWD, path, CALL(unlink)(path)) }
int unlinkat(int folder, const char *path, int flags) { PATH_CALL(CHANGE_ENTRY, "unlink", folder, path, CALL(unlinkat)(folder, path, flags)) }
int rename(const char *from, const char *to) { PATH_CALL(CHANGE_ENTRY, "rename", AT_FDCWD, to, CALL(rename)(from, to)) }
int renameat(int a, const char *from, int b, const char *to) { PATH_CALL(CHANGE_ENTRY, "rename", b, to, CALL(renameat)(a, from, b, to)) }
int link(const char *from, const char *to) { PATH_CALL(CREATE, "link", AT_FDCWD, to, CALL(link)(from, to)) }
int chmod(const char *path, mode_t mode) { PATH_CALL(CHANGE_ENTRY, "chmod", AT_FDCWD, path, CALL(chmod)(path, mode)) }
