/* Faults of a machine, for LD_PRELOAD. The file named by STANDBY_FAULTS says which, one a line:

     clock SECONDS           the time of day is off by so much
     sync-error PART         fsync of files with PART in their paths fails with EIO
     sync-delay SECONDS PART fsync of files with PART in their paths takes so much longer
     read-error FROM PART    bytes from FROM on, a sector of 4096, of files with PART in their paths cannot be read
                             (EIO) until they are written: then the device takes another sector

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

#define SECTOR 4096

/* Sectors that were written since they could not be read. */
static off_t written[256];
static int count;

static int is_written(off_t from) {
    for (int i = 0; i < count; i++)
        if (written[i] == from) return 1;
    return 0;
}

/* Calls `each` with the sectors that cannot be read, of the file behind `fd`, among these bytes. */
static int bad_sectors(int fd, off_t start, size_t length, void (*each)(off_t)) {
    const char *name = getenv("STANDBY_FAULTS");
    FILE *file = name ? fopen(name, "r") : NULL;
    char line[512], part[256], link[64], path[4096];
    long long from;
    int found = 0;
    if (file == NULL) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t end = readlink(link, path, sizeof path - 1);
    path[end > 0 ? end : 0] = 0;
    while (fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "read-error %lld %255s", &from, part) != 2 || !strstr(path, part)) continue;
        if (from < start + (off_t)length && start < from + SECTOR && !is_written(from)) {
            found = 1;
            if (each) each(from);
        }
    }
    fclose(file);
    return found;
}

static void note(off_t from) {
    if (count < (int)(sizeof written / sizeof written[0])) written[count++] = from;
}

ssize_t pread64(int fd, void *buffer, size_t length, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (real == NULL) real = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread64");
    if (bad_sectors(fd, offset, length, NULL)) {
        errno = EIO;
        return -1;
    }
    return real(fd, buffer, length, offset);
}

ssize_t pwrite64(int fd, const void *buffer, size_t length, off_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (real == NULL) real = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
    ssize_t done = real(fd, buffer, length, offset);
    if (done > 0) bad_sectors(fd, offset, (size_t)done, note);
    return done;
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }
