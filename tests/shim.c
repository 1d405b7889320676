/* Faults of a machine, for LD_PRELOAD. The file named by STANDBY_FAULTS says which, one a line:

     clock SECONDS           the time of day is off by so much
     sync-error PART         fsync of files with PART in their paths fails with EIO
     sync-delay SECONDS PART fsync of files with PART in their paths takes so much longer

   It is read at each call, so that a test may change it while the process runs. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double number(const char *kind, const char *path) {
    const char *name = getenv("STANDBY_FAULTS");
    FILE *file = name ? fopen(name, "r") : NULL;
    char line[512], word[64], part[256];
    double value, found = 0;
    if (file == NULL) return 0;
    while (fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "%63s", word) != 1 || strcmp(word, kind) != 0) continue;
        if (strcmp(kind, "clock") == 0) {
            if (sscanf(line, "%*s %lf", &value) == 1) found = value;
        } else if (strcmp(kind, "sync-error") == 0) {
            if (sscanf(line, "%*s %255s", part) == 1 && strstr(path, part)) found = 1;
        } else if (sscanf(line, "%*s %lf %255s", &value, part) == 2 && strstr(path, part)) {
            found = value;
        }
    }
    fclose(file);
    return found;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (real == NULL) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, time);
    if (result == 0 && clock == CLOCK_REALTIME) time->tv_sec += (time_t)number("clock", "");
    return result;
}

static int synced(int fd, const char *name) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    double delay = number("sync-delay", path);
    if (delay > 0) {
        struct timespec time = {(time_t)delay, (long)((delay - (time_t)delay) * 1e9)};
        nanosleep(&time, NULL);
    }
    if (number("sync-error", path) > 0) {
        errno = EIO;
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(fd);
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }
