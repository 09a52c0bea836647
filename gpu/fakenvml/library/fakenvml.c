/* A stand-in for NVIDIA's libnvidia-ml.so.1, for tests on hosts without a GPU. It has the functions of NVML that
 * flightsvc calls, and reads what they answer from a folder, at each call but for the list of devices:
 *
 *   $FAKENVML_STATE/devices        a line for each: UUID NAME BYTES COMPUTE PARENT, with blanks between. NAME has _ for
 *                                  blanks, COMPUTE is as 8.0, PARENT is - or the UUID of the GPU whose MIG
 *                                  instance it is; that GPU is then in MIG mode. Read by nvmlInit.
 *   $FAKENVML_STATE/UUID/PID       bytes that the process has on the device. They count while it lives, and for
 *                                  the milliseconds in $FAKENVML_STATE/delay after its end was first seen.
 *   $FAKENVML_STATE/UUID/hidden    if there, processes are not listed, as in a container
 *   $FAKENVML_STATE/UUID/error     a number of nvmlReturn_t, which every question about the device gets
 *   $FAKENVML_STATE/xid            a line UUID XID for each event; those added after a set of events was made are heard
 *   $FAKENVML_STATE/hang           while it is there, no question about memory is answered
 *
 * Built by   cc -shared -fPIC -O1 -o DIR/libnvidia-ml.so.1 fakenvml.c   and found through LD_LIBRARY_PATH=DIR.
 * Types are those of nvml.h, https://docs.nvidia.com/deploy/nvml-api/. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

typedef int nvmlReturn_t;
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, UNKNOWN = 999 };
enum { MOST = 64, NONE = 0xFFFFFFFF, XID_CRITICAL_ERROR = 8 };

typedef struct device {
    char uuid[96], name[96], parent[96];
    unsigned long long bytes;
    int major, minor, instance, instances; /* number among its GPU's instances, and of its own */
} *nvmlDevice_t;
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned int gpu, memory; } nvmlUtilization_t;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gi, ci; } nvmlProcessInfo_t;
typedef struct { nvmlDevice_t device; unsigned long long type, data; unsigned int gi, ci; } nvmlEventData_t;
typedef struct { long heard; } *nvmlEventSet_t;

static struct device devices[MOST];
static int count;

static FILE *open_state(const char *folder, const char *name) {
    char path[4096];
    const char *state = getenv("FAKENVML_STATE");
    snprintf(path, sizeof path, "%s/%s%s%s", state ? state : "", folder, *folder ? "/" : "", name);
    return fopen(path, "r");
}

static long long number(const char *folder, const char *name) { /* -1 where there is none */
    long long value = -1;
    FILE *file = open_state(folder, name);
    if (file) {
        if (fscanf(file, "%lld", &value) != 1) value = -1;
        fclose(file);
    }
    return value;
}

static struct device *by_uuid(const char *uuid) {
    for (int i = 0; i < count; i++)
        if (!strcmp(devices[i].uuid, uuid)) return &devices[i];
    return NULL;
}

static nvmlReturn_t broken(struct device *d) {
    FILE *hang;
    while ((hang = open_state("", "hang"))) {
        fclose(hang);
        usleep(10000);
    }
    long long error = number(d->uuid, "error");
    return error < 0 ? SUCCESS : (nvmlReturn_t)error;
}

static int alive(long pid) {
    char path[64], state = 0;
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    if (fscanf(file, "%*d (%*[^)]) %c", &state) != 1) state = 0;
    fclose(file);
    return state != 'Z' && state != 'X';
}

/* processes fills in who has memory of a device and returns how many there are. An ended process counts by a file
 * PID.gone, whose time is that at which its end was seen. */
static unsigned int processes(struct device *d, nvmlProcessInfo_t *list, unsigned int most, unsigned long long *sum) {
    char folder[2048], path[4096], gone[4200];
    unsigned int n = 0;
    const char *state = getenv("FAKENVML_STATE");
    snprintf(folder, sizeof folder, "%s/%s", state ? state : "", d->uuid);
    DIR *dir = opendir(folder);
    struct dirent *entry;
    *sum = 0;
    while (dir && (entry = readdir(dir))) {
        char *rest;
        long pid = strtol(entry->d_name, &rest, 10);
        long long bytes;
        struct stat about;
        if (pid <= 0 || (*rest && strcmp(rest, ".gone"))) continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if ((bytes = number(d->uuid, entry->d_name)) < 0) continue;
        if (*rest) {
            struct timeval now;
            long long delay = number("", "delay");
            gettimeofday(&now, NULL);
            if (stat(path, &about)) continue;
            if ((now.tv_sec - about.st_mtim.tv_sec) * 1000 + now.tv_usec / 1000 - about.st_mtim.tv_nsec / 1000000 >= delay) {
                unlink(path);
                continue;
            }
        } else if (!alive(pid)) {
            utimes(path, NULL);
            snprintf(gone, sizeof gone, "%s.gone", path);
            rename(path, gone);
            if (number("", "delay") <= 0) unlink(gone), bytes = 0;
        } else if (n < most) {
            list[n++] = (nvmlProcessInfo_t){(unsigned int)pid, (unsigned long long)bytes, NONE, NONE};
        } else {
            n++;
        }
        *sum += (unsigned long long)bytes;
    }
    if (dir) closedir(dir);
    return n;
}

nvmlReturn_t nvmlInit_v2(void) {
    char line[512], compute[32];
    FILE *file = open_state("", "devices");
    if (!file) return DRIVER_NOT_LOADED;
    for (count = 0; count < MOST && fgets(line, sizeof line, file);) {
        struct device *d = &devices[count];
        memset(d, 0, sizeof *d);
        if (sscanf(line, "%95s %95s %llu %31s %95s", d->uuid, d->name, &d->bytes, compute, d->parent) != 5) continue;
        sscanf(compute, "%d.%d", &d->major, &d->minor);
        for (char *c = d->name; *c; c++)
            if (*c == '_') *c = ' ';
        struct device *gpu = by_uuid(d->parent);
        if (gpu) d->instance = gpu->instances++;
        count++;
    }
    fclose(file);
    return SUCCESS;
}
nvmlReturn_t nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(nvmlReturn_t code) {
    switch (code) {
    case SUCCESS: return "Success";
    case NOT_SUPPORTED: return "Not Supported";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case 15: return "GPU is lost";
    case UNKNOWN: return "Unknown Error";
    default: return "another error of the stand-in for NVML";
    }
}

static struct device *nth(const char *parent, unsigned int index) { /* the nth GPU, or instance of one */
    for (int i = 0; i < count; i++)
        if (!strcmp(devices[i].parent, parent) && index-- == 0) return &devices[i];
    return NULL;
}
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *n) {
    for (*n = 0; nth("-", *n); ++*n) {}
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *d) { return (*d = nth("-", index)) ? SUCCESS : INVALID_ARGUMENT; }
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *d) { return (*d = by_uuid(uuid)) ? SUCCESS : NOT_FOUND; }
nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t d, unsigned int *now, unsigned int *later) {
    *now = *later = d->instances > 0;
    return SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t d, unsigned int *n) { return *n = d->instances ? 7 : 0, SUCCESS; }
nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t d, unsigned int index, nvmlDevice_t *instance) { return (*instance = nth(d->uuid, index)) ? SUCCESS : NOT_FOUND; }
nvmlReturn_t nvmlDeviceGetGpuInstanceId(nvmlDevice_t d, unsigned int *id) { return *id = d->instance + 1, SUCCESS; }
nvmlReturn_t nvmlDeviceGetComputeInstanceId(nvmlDevice_t d, unsigned int *id) { return (void)d, *id = 0, SUCCESS; }

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t d, char *name, unsigned int length) { return snprintf(name, length, "%s", d->name), SUCCESS; }
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t d, char *uuid, unsigned int length) { return snprintf(uuid, length, "%s", d->uuid), SUCCESS; }
nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t d, int *major, int *minor) { return *major = d->major, *minor = d->minor, SUCCESS; }
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t d, nvmlMemory_t *memory) {
    nvmlReturn_t error = broken(d);
    memory->total = d->bytes;
    processes(d, NULL, 0, &memory->used);
    if (memory->used > d->bytes) memory->used = d->bytes;
    memory->free = d->bytes - memory->used;
    return error;
}
nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t d, nvmlUtilization_t *busy) {
    nvmlMemory_t memory;
    nvmlReturn_t error = nvmlDeviceGetMemoryInfo(d, &memory);
    busy->gpu = memory.used > 0; /* percent */
    busy->memory = 0;
    return strcmp(d->parent, "-") ? NOT_SUPPORTED : error;
}
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t d, unsigned int *n, nvmlProcessInfo_t *list) {
    unsigned long long sum;
    nvmlReturn_t error = broken(d);
    FILE *hidden = open_state(d->uuid, "hidden");
    unsigned int most = *n;
    if (hidden) {
        fclose(hidden);
        *n = 0;
        return error;
    }
    *n = processes(d, list, most, &sum);
    return error ? error : *n > most ? INSUFFICIENT_SIZE : SUCCESS;
}

nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set) {
    FILE *file = open_state("", "xid");
    *set = calloc(1, sizeof **set);
    if (file) {
        fseek(file, 0, SEEK_END);
        (*set)->heard = ftell(file);
        fclose(file);
    }
    return *set ? SUCCESS : UNKNOWN;
}
nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t d, unsigned long long types, nvmlEventSet_t set) { return (void)types, d && set ? SUCCESS : INVALID_ARGUMENT; }
nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *event, unsigned int milliseconds) {
    for (long left = milliseconds; left >= 0; left -= 10) {
        char uuid[96];
        unsigned long long xid;
        FILE *file = open_state("", "xid");
        int found = 0;
        if (file) {
            fseek(file, set->heard, SEEK_SET);
            if ((found = fscanf(file, "%95s %llu", uuid, &xid) == 2)) set->heard = ftell(file);
            fclose(file);
        }
        struct device *d = found ? by_uuid(uuid) : NULL;
        if (d) {
            struct device *gpu = by_uuid(d->parent);
            *event = (nvmlEventData_t){gpu ? gpu : d, XID_CRITICAL_ERROR, xid, gpu ? (unsigned int)d->instance + 1 : NONE, gpu ? 0 : NONE};
            return SUCCESS;
        }
        usleep(10000);
    }
    return TIMEOUT;
}
nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set) { return free(set), SUCCESS; }
