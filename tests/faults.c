/* Breaks a process at a chosen file event, for tests: LD_PRELOAD it under any code, SQLite included.

   Counted are the calls that change files below one root: open (for writing), write, truncate, sync, rename, unlink,
   mkdir, chmod; fsync of a folder too. Reads count only where FAULTS_KIND is read, and are never in the log. At the
   FAULTS_AT-th of those that match it does what FAULTS_DO says.

   FAULTS_ROOT   absolute, without symbolic links; nothing is counted without it
   FAULTS_LOG    file that gets a line for each event before it: number, kind, path[, new path], tab-separated
   FAULTS_AT     number of the event, from 1; 0 or unset: never
   FAULTS_DO     kill, term, int, stop: that signal. torn: half of a write, then SIGKILL. ENOSPC, EIO, EROFS, EACCES:
                 the call fails
   FAULTS_WHEN   before (default) or after the call, for signals
   FAULTS_KIND   count events of this kind only
   FAULTS_PATH   count events only whose path, old or new, holds this text
   FAULTS_STICKY 1: every later event that matches fails too, as on a full disk
   FAULTS_CLOCK  K:SECONDS sets the wall clock back after K readings of it, *:SECONDS further back at every reading

   A process counts for itself: what it forks is left alone. `faults_arm` reads the variables again, after a fork. */
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
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { TORN = -1 };

static struct {
    pid_t pid;
    char root[PATH_MAX], kind[32], path[PATH_MAX];
    long at, clock_after, clock_back;
    int signal, error, torn, after, sticky, log, clock_every;
} plan;
static long counted, matched, readings;
static int reads;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

__attribute__((constructor)) void faults_arm(void) {
    static const struct { const char *name; int signal, error, torn; } deeds[] = {
        {"kill", SIGKILL, 0, 0}, {"term", SIGTERM, 0, 0},   {"int", SIGINT, 0, 0},     {"torn", SIGKILL, 0, 1}, {"stop", SIGSTOP, 0, 0},
        {"ENOSPC", 0, ENOSPC, 0}, {"EIO", 0, EIO, 0}, {"EROFS", 0, EROFS, 0}, {"EACCES", 0, EACCES, 0},
    };
    memset(&plan, 0, sizeof plan);
    counted = matched = readings = 0;
    plan.log = -1;
    snprintf(plan.root, sizeof plan.root, "%s", setting("FAULTS_ROOT"));
    snprintf(plan.kind, sizeof plan.kind, "%s", setting("FAULTS_KIND"));
    snprintf(plan.path, sizeof plan.path, "%s", setting("FAULTS_PATH"));
    reads = !strcmp(plan.kind, "read");
    plan.at = atol(setting("FAULTS_AT"));
    plan.after = !strcmp(setting("FAULTS_WHEN"), "after");
    plan.sticky = atoi(setting("FAULTS_STICKY"));
    for (size_t i = 0; i < sizeof deeds / sizeof *deeds; i++)
        if (!strcmp(setting("FAULTS_DO"), deeds[i].name))
            plan.signal = deeds[i].signal, plan.error = deeds[i].error, plan.torn = deeds[i].torn;
    const char *clock = setting("FAULTS_CLOCK"), *colon = strchr(clock, ':');
    if (colon) {
        plan.clock_every = *clock == '*';
        plan.clock_after = atol(clock);
        plan.clock_back = atol(colon + 1);
    }
    if (*plan.root && *setting("FAULTS_LOG"))
        plan.log = syscall(SYS_openat, AT_FDCWD, setting("FAULTS_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    plan.pid = getpid();
}

/* ---------------------------------------------------------------- paths */

static int of_descriptor(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static void absolute(int folder, const char *name, char *path) {
    char start[PATH_MAX] = "";
    if (*name != '/' && !(folder == AT_FDCWD ? getcwd(start, sizeof start) != NULL : of_descriptor(folder, start)))
        *start = 0;
    while (!strncmp(name, "./", 2)) name += 2;
    if (snprintf(path, PATH_MAX, "%s%s%s", start, *start ? "/" : "", name) >= PATH_MAX) *path = 0;
}

static int below_root(const char *path) {
    size_t length = strlen(plan.root);
    return !strncmp(path, plan.root, length) && (path[length] == '/' || path[length] == 0);
}

/* ---------------------------------------------------------------- events */

static void strike(int signal) {
    kill(getpid(), signal);
    if (signal == SIGKILL)
        for (;;) pause();
}

/* What the call must do: 0 go on, TORN, or fail with an errno. *pending is set where a signal comes after the call. */
static int event(const char *kind, const char *path, const char *to, int *pending) {
    *pending = 0;
    if (!*plan.root || getpid() != plan.pid || !(below_root(path) || (to && below_root(to)))) return 0;
    if (plan.log >= 0 && strcmp(kind, "read")) {
        char line[2 * PATH_MAX + 64];
        long number = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
        int length = snprintf(line, sizeof line, "%ld\t%s\t%s%s%s\n", number, kind, path, to ? "\t" : "", to ? to : "");
        syscall(SYS_write, plan.log, line, length);
    }
    if (!plan.at || (*plan.kind && strcmp(kind, plan.kind))) return 0;
    if (*plan.path && !strstr(path, plan.path) && !(to && strstr(to, plan.path))) return 0;
    long number = __atomic_add_fetch(&matched, 1, __ATOMIC_SEQ_CST);
    if (number != plan.at && !(plan.sticky && number > plan.at)) return 0;
    if (plan.torn && !strcmp(kind, "write")) return TORN;
    if (plan.signal && plan.after) *pending = plan.signal;
    else if (plan.signal) strike(plan.signal);
    return plan.error;
}

static void finish(int pending) {
    int kept = errno;
    if (pending) strike(pending);
    errno = kept;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = dlsym(RTLD_NEXT, name)

/* call: the expression; kind, path, to: the event. Returns from the function. */
#define AROUND(type, kind, path, to, call) \
    int pending, deed = event(kind, path, to, &pending); \
    if (deed > 0) { errno = deed; return -1; } \
    type result = call; \
    finish(pending); \
    return result

static int changes(int flags) { return (flags & (O_ACCMODE | O_CREAT | O_TRUNC)) != O_RDONLY; }

#define OPEN(function, parameters, folder, ...) \
    int function parameters { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        REAL(int, #function, __VA_ARGS__, ...); \
        if (!changes(flags)) return CALL_##function; \
        char path[PATH_MAX]; \
        absolute(folder, name, path); \
        AROUND(int, "open", path, NULL, CALL_##function); \
    }
#define CALL_open real(name, flags, mode)
#define CALL_open64 real(name, flags, mode)
#define CALL_openat real(at, name, flags, mode)
#define CALL_openat64 real(at, name, flags, mode)
OPEN(open, (const char *name, int flags, ...), AT_FDCWD, const char *, int)
OPEN(open64, (const char *name, int flags, ...), AT_FDCWD, const char *, int)
OPEN(openat, (int at, const char *name, int flags, ...), at, int, const char *, int)
OPEN(openat64, (int at, const char *name, int flags, ...), at, int, const char *, int)

int creat(const char *name, mode_t mode) { return open(name, O_WRONLY | O_CREAT | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return open(name, O_WRONLY | O_CREAT | O_TRUNC, mode); }

static void tear(ssize_t written) {
    (void)written;
    strike(SIGKILL);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    char path[PATH_MAX];
    if (!*plan.root || !of_descriptor(fd, path)) return real(fd, data, size);
    int pending, deed = event("write", path, NULL, &pending);
    if (deed > 0) { errno = deed; return -1; }
    if (deed == TORN) tear(real(fd, data, size / 2));
    ssize_t result = real(fd, data, size);
    finish(pending);
    return result;
}

#define PWRITE(function) \
    ssize_t function(int fd, const void *data, size_t size, off_t at) { \
        REAL(ssize_t, #function, int, const void *, size_t, off_t); \
        char path[PATH_MAX]; \
        if (!*plan.root || !of_descriptor(fd, path)) return real(fd, data, size, at); \
        int pending, deed = event("write", path, NULL, &pending); \
        if (deed > 0) { errno = deed; return -1; } \
        if (deed == TORN) tear(real(fd, data, size / 2, at)); \
        ssize_t result = real(fd, data, size, at); \
        finish(pending); \
        return result; \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    char path[PATH_MAX];
    if (!*plan.root || !of_descriptor(fd, path)) return real(fd, parts, count);
    int pending, deed = event("write", path, NULL, &pending);
    if (deed > 0) { errno = deed; return -1; }
    if (deed == TORN) tear(real(fd, parts, count / 2));
    ssize_t result = real(fd, parts, count);
    finish(pending);
    return result;
}

#define READ(function, parameters, call, ...) \
    ssize_t function parameters { \
        REAL(ssize_t, #function, __VA_ARGS__); \
        char path[PATH_MAX]; \
        if (!reads || !of_descriptor(fd, path)) return call; \
        AROUND(ssize_t, "read", path, NULL, call); \
    }
READ(read, (int fd, void *data, size_t size), real(fd, data, size), int, void *, size_t)
READ(pread, (int fd, void *data, size_t size, off_t at), real(fd, data, size, at), int, void *, size_t, off_t)
READ(pread64, (int fd, void *data, size_t size, off64_t at), real(fd, data, size, at), int, void *, size_t, off64_t)

#define ON_DESCRIPTOR(function, kind, parameters, call, ...) \
    int function parameters { \
        REAL(int, #function, __VA_ARGS__); \
        char path[PATH_MAX]; \
        if (!*plan.root || !of_descriptor(fd, path)) return call; \
        AROUND(int, kind, path, NULL, call); \
    }
ON_DESCRIPTOR(ftruncate, "truncate", (int fd, off_t size), real(fd, size), int, off_t)
ON_DESCRIPTOR(ftruncate64, "truncate", (int fd, off64_t size), real(fd, size), int, off64_t)
ON_DESCRIPTOR(fsync, "sync", (int fd), real(fd), int)
ON_DESCRIPTOR(fdatasync, "sync", (int fd), real(fd), int)
ON_DESCRIPTOR(fchmod, "chmod", (int fd, mode_t mode), real(fd, mode), int, mode_t)

#define ON_PATH(function, kind, folder, parameters, call, ...) \
    int function parameters { \
        REAL(int, #function, __VA_ARGS__); \
        char path[PATH_MAX]; \
        absolute(folder, name, path); \
        AROUND(int, kind, path, NULL, call); \
    }
ON_PATH(unlink, "unlink", AT_FDCWD, (const char *name), real(name), const char *)
ON_PATH(unlinkat, "unlink", at, (int at, const char *name, int flags), real(at, name, flags), int, const char *, int)
ON_PATH(mkdir, "mkdir", AT_FDCWD, (const char *name, mode_t mode), real(name, mode), const char *, mode_t)
ON_PATH(mkdirat, "mkdir", at, (int at, const char *name, mode_t mode), real(at, name, mode), int, const char *, mode_t)
ON_PATH(chmod, "chmod", AT_FDCWD, (const char *name, mode_t mode), real(name, mode), const char *, mode_t)

#define RENAME(function, from, to, parameters, call, ...) \
    int function parameters { \
        REAL(int, #function, __VA_ARGS__); \
        char path[PATH_MAX], new_path[PATH_MAX]; \
        absolute(from, name, path); \
        absolute(to, new_name, new_path); \
        AROUND(int, "rename", path, new_path, call); \
    }
RENAME(rename, AT_FDCWD, AT_FDCWD, (const char *name, const char *new_name), real(name, new_name), const char *, const char *)
RENAME(renameat, at, to, (int at, const char *name, int to, const char *new_name), real(at, name, to, new_name), int,
       const char *, int, const char *)
RENAME(renameat2, at, to, (int at, const char *name, int to, const char *new_name, unsigned flags),
       real(at, name, to, new_name, flags), int, const char *, int, const char *, unsigned)

/* ---------------------------------------------------------------- the wall clock */

static time_t behind(void) {
    if (!plan.clock_back) return 0;
    long number = __atomic_add_fetch(&readings, 1, __ATOMIC_SEQ_CST);
    if (plan.clock_every) return plan.clock_back * number;
    return number > plan.clock_after ? plan.clock_back : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int result = real(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec -= behind();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(int, "gettimeofday", struct timeval *, void *);
    int result = real(now, zone);
    if (!result) now->tv_sec -= behind();
    return result;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
