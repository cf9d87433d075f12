/* Put before the C library of a process (LD_PRELOAD): a wall clock that jumps back whenever anybody looks at it, and a
   folder whose files are opened, renamed and written through slowly. What a process asks for stands in its environment. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, name))

static long long looks;

static long asked(const char *name)
{
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int status = NEXT(int (*)(clockid_t, struct timespec *), "clock_gettime")(clock, now);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec -= asked("TMPQ_EXP_TEST_SECONDS_BACK") * __atomic_add_fetch(&looks, 1, __ATOMIC_RELAXED);
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec precise;
    int status = clock_gettime(CLOCK_REALTIME, &precise);
    (void)zone;
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return status;
}

time_t time(time_t *now)
{
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now)
        *now = precise.tv_sec;
    return precise.tv_sec;
}

static void dawdle(const char *path)
{
    const char *folder = getenv("TMPQ_EXP_TEST_SLOW_FOLDER");
    if (folder && (!path || !strncmp(path, folder, strlen(folder))))
        usleep(1000 * asked("TMPQ_EXP_TEST_SLOW_MILLISECONDS"));
}

int fsync(int file)
{
    dawdle(NULL);
    return NEXT(int (*)(int), "fsync")(file);
}

int rename(const char *from, const char *to)
{
    dawdle(to);
    return NEXT(int (*)(const char *, const char *), "rename")(from, to);
}

static int mode_of(int flags, va_list more)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0;
}

#define SLOW_OPEN(name)                                                        \
    int name(const char *path, int flags, ...)                                 \
    {                                                                          \
        va_list more;                                                          \
        va_start(more, flags);                                                 \
        int mode = mode_of(flags, more);                                       \
        va_end(more);                                                          \
        dawdle(path);                                                          \
        return NEXT(int (*)(const char *, int, ...), #name)(path, flags, mode); \
    }

SLOW_OPEN(open)
SLOW_OPEN(open64)
