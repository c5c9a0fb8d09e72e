/* A double of libcuda.so.1 on host memory: what the host side of a CUDA program can do wrong, it notices and counts.
 *
 * It is stricter than a GPU. Work on a stream is not begun before somebody waits for that stream, so that whoever
 * touches a buffer too early gets wrong numbers every time. Each function can be told to fail, once or for good.
 * Unlike the real one it knows one kind of device, and a context is freed as soon as nobody retains it.
 *
 * While a stream is captured, its work is recorded and not done; launching the graph puts a copy of it on a stream. What
 * CUDA forbids meanwhile is refused and invalidates the capture: waiting for that stream, or for the whole context from
 * any thread; in the capturing thread, unless it asked to be relaxed, also what is not asynchronous. Captures are of one
 * stream each; events do not carry one over to another.
 *
 * Environment: DOUBLE_DEVICES (1), DOUBLE_NAME, DOUBLE_CAPABILITY (87), DOUBLE_DRIVER (12060), DOUBLE_MEMORY (bytes).
 * For tests: double_fail, double_lose, double_recover, double_count, double_calls.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef void (*CUhostFn)(void *);

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_WRONG_THREAD = 908,
    ILLEGAL_STATE = 401,
    UNKNOWN = 999,
};

enum { MAX_DEPTH = 64, MAX_FAULTS = 16, MAX_NAMES = 256 };

typedef struct {
    int device, primary, retained;
} Context;

typedef struct Block {
    struct Block *next;
    char *start;
    size_t size;
    Context *owner;
    int pinned;
} Block;

typedef struct Work {
    struct Work *next;
    char *to;
    const char *from;
    size_t size;
    CUhostFn run;
    void *argument;
    struct Event *event;
} Work;

/* A recording (CUgraph), or what was made of one to be launched (CUgraphExec). */
typedef struct Graph {
    struct Graph *next;
    Work *first, *last;
    struct Stream *origin;
    int executable;
} Graph;

enum { GLOBAL, THREAD_LOCAL, RELAXED };

typedef struct Stream {
    struct Stream *next;
    Context *owner;
    Work *first, *last;
    int running;
    Graph *capture;
    pthread_t capturer;
    int mode, invalid, non_blocking;
} Stream;

typedef struct Event {
    struct Event *next;
    Context *owner;
    Stream *stream;
    int recorded, done;
    double when;
} Event;

static struct {
    const char *name;
    CUresult code;
    long after; /* calls that still succeed */
    int for_good;
} faults[MAX_FAULTS];

static struct {
    const char *name;
    long calls;
} called[MAX_NAMES];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t idle = PTHREAD_COND_INITIALIZER;
static int initialized, lost;
static Context primary[8];
static Block *blocks;
static Stream *streams;
static Event *events;
static Graph *graphs;
static long pushes, pops, contexts_created, on_default_stream, pageable_copies, freed_in_flight, strangers, device_bytes,
    orphaned_graphs, uploaded_bytes;

static __thread Context *stack[MAX_DEPTH];
static __thread int depth;

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

/* Count a call and say whether it is to fail. The lock is held. */
static CUresult asked(const char *name) {
    int i;
    for (i = 0; i < MAX_NAMES && called[i].name && strcmp(called[i].name, name); i++) {
    }
    if (i < MAX_NAMES) {
        called[i].name = name;
        called[i].calls++;
    }
    for (i = 0; i < MAX_FAULTS; i++) {
        if (!faults[i].name || strcmp(faults[i].name, name)) {
            continue;
        }
        if (faults[i].after-- > 0) {
            continue;
        }
        if (!faults[i].for_good) {
            faults[i].name = NULL;
        }
        return faults[i].code;
    }
    return SUCCESS;
}

static Context *current(void) { return depth ? stack[depth - 1] : NULL; }

static CUresult alive(const Context *context) {
    if (!initialized) {
        return NOT_INITIALIZED;
    }
    if (!context) {
        return INVALID_CONTEXT;
    }
    return context->retained > 0 ? SUCCESS : CONTEXT_IS_DESTROYED;
}

#define BEGIN(name)                                                                                                    \
    CUresult code;                                                                                                     \
    pthread_mutex_lock(&lock);                                                                                         \
    code = asked(name);                                                                                                \
    if (code) {                                                                                                        \
        goto end;                                                                                                      \
    }
#define IN_CONTEXT(name)                                                                                               \
    BEGIN(name)                                                                                                        \
    code = lost ? lost : alive(current());                                                                             \
    if (code) {                                                                                                        \
        goto end;                                                                                                      \
    }
#define FAIL(what)                                                                                                     \
    do {                                                                                                               \
        code = what;                                                                                                   \
        goto end;                                                                                                      \
    } while (0)
#define END                                                                                                            \
    end:                                                                                                               \
    pthread_mutex_unlock(&lock);                                                                                       \
    return code;

static Block *block_of(const void *at, size_t size, int pinned) {
    const char *start = at;
    for (Block *b = blocks; b; b = b->next) {
        if (b->pinned == pinned && start >= b->start && start + size <= b->start + b->size) {
            return b;
        }
    }
    return NULL;
}

static Stream *stream_of(const void *handle) {
    for (Stream *s = streams; s; s = s->next) {
        if (s == handle) {
            return s;
        }
    }
    return NULL;
}

static Event *event_of(const void *handle) {
    for (Event *e = events; e; e = e->next) {
        if (e == handle) {
            return e;
        }
    }
    return NULL;
}

/* Do what waits on a stream. The lock is held, but not while a host function runs: it may want another lock. */
static void drain(Stream *s) {
    while (s->running) {
        pthread_cond_wait(&idle, &lock);
    }
    s->running = 1;
    while (s->first) {
        Work *w = s->first;
        if (w->run) {
            pthread_mutex_unlock(&lock);
            w->run(w->argument);
            pthread_mutex_lock(&lock);
        } else if (w->event) {
            w->event->when = now();
            w->event->done = 1;
        } else if (!lost) {
            memcpy(w->to, w->from, w->size);
        }
        s->first = w->next;
        free(w);
    }
    s->last = NULL;
    s->running = 0;
    pthread_cond_broadcast(&idle);
}

static void enqueue(Stream *s, Work work) {
    Work *w = malloc(sizeof *w);
    *w = work;
    w->next = NULL;
    if (s->last) {
        s->last->next = w;
    } else {
        s->first = w;
    }
    s->last = w;
}

static void append(Graph *g, Work work) {
    Work *w = malloc(sizeof *w);
    *w = work;
    w->next = NULL;
    if (g->last) {
        g->last->next = w;
    } else {
        g->first = w;
    }
    g->last = w;
}

/* Put work on a stream, or into the recording of it. */
static CUresult submit(Stream *s, Work work) {
    if (!s->capture) {
        enqueue(s, work);
    } else if (s->invalid) {
        return CAPTURE_INVALIDATED;
    } else {
        append(s->capture, work);
    }
    return SUCCESS;
}

/* Refuse what must not be done while anything of a context is captured. */
static CUresult whole_context(const Context *context) {
    CUresult code = SUCCESS;
    for (Stream *s = streams; s; s = s->next) {
        if (s->capture && s->owner == context) {
            s->invalid = 1;
            code = CAPTURE_UNSUPPORTED;
        }
    }
    return code;
}

/* Refuse what is not asynchronous while this thread captures, or any thread that forbids it to all. */
static CUresult unsafe(void) {
    CUresult code = SUCCESS;
    for (Stream *s = streams; s; s = s->next) {
        if (s->capture && (s->mode == GLOBAL || (s->mode == THREAD_LOCAL && pthread_equal(s->capturer, pthread_self())))) {
            s->invalid = 1;
            code = CAPTURE_UNSUPPORTED;
        }
    }
    return code;
}

static CUresult one_stream(Stream *s) {
    if (s->capture) {
        s->invalid = 1;
        return CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

static Graph *graph_of(const void *handle, int executable) {
    for (Graph *g = graphs; g; g = g->next) {
        if (g == handle && g->executable == executable) {
            return g;
        }
    }
    return NULL;
}

static Graph *new_graph(Stream *origin, int executable) {
    Graph *g = calloc(1, sizeof *g);
    g->origin = origin;
    g->executable = executable;
    g->next = graphs;
    graphs = g;
    return g;
}

static CUresult destroy_graph(void *handle, int executable) {
    for (Graph **at = &graphs; *at; at = &(*at)->next) {
        Graph *g = *at;
        if (g != handle || g->executable != executable) {
            continue;
        }
        *at = g->next;
        for (Work *w = g->first; w;) {
            Work *next = w->next;
            free(w);
            w = next;
        }
        free(g);
        return SUCCESS;
    }
    return INVALID_HANDLE;
}

static int in_flight(const Block *b) {
    for (Stream *s = streams; s; s = s->next) {
        for (Work *w = s->first; w; w = w->next) {
            int reads = w->from >= b->start && w->from < b->start + b->size;
            int writes = w->to >= b->start && w->to < b->start + b->size;
            if (w->size && (reads || writes)) {
                return 1;
            }
        }
    }
    return 0;
}

static CUresult take(void **result, size_t size, int pinned) {
    Block *b;
    if (!size || !result) {
        return INVALID_VALUE;
    }
    if (!pinned && device_bytes + (long)size > setting("DOUBLE_MEMORY", 1L << 30)) {
        return OUT_OF_MEMORY;
    }
    b = calloc(1, sizeof *b);
    if (!b || posix_memalign((void **)&b->start, 256, size)) {
        free(b);
        return OUT_OF_MEMORY;
    }
    memset(b->start, 0xA5, size); /* what nobody wrote must not look like an answer */
    b->size = size;
    b->owner = current();
    b->pinned = pinned;
    b->next = blocks;
    blocks = b;
    device_bytes += pinned ? 0 : (long)size;
    *result = b->start;
    return SUCCESS;
}

static CUresult give(void *start, int pinned) {
    for (Block **at = &blocks; *at; at = &(*at)->next) {
        Block *b = *at;
        if (b->start != start || b->pinned != pinned) {
            continue;
        }
        strangers += b->owner != current();
        freed_in_flight += in_flight(b);
        *at = b->next;
        device_bytes -= pinned ? 0 : (long)b->size;
        memset(b->start, 0x5A, b->size); /* so that using it afterwards shows */
        free(b->start);
        free(b);
        return SUCCESS;
    }
    return INVALID_VALUE;
}

static CUresult copy(void *to, const void *from, size_t size, void *handle, const void *host) {
    Stream *s = stream_of(handle);
    if (!handle) {
        on_default_stream++;
    } else if (!s) {
        return INVALID_HANDLE;
    }
    if (!block_of(host == to ? from : to, size, 0) || (!host && !block_of(from, size, 0))) {
        return INVALID_VALUE;
    }
    pageable_copies += host && !block_of(host, size, 1);
    if (s) {
        strangers += s->owner != current();
        return submit(s, (Work){.to = to, .from = from, .size = size});
    }
    if (unsafe()) {
        return CAPTURE_UNSUPPORTED;
    }
    memcpy(to, from, size);
    return SUCCESS;
}

/* ---- what tests ask ---- */

/* Let a function fail: `after` more calls succeed, then one fails, or all from then on. Return 0, or 1 for no room. */
int double_fail(const char *name, int code, long after, int for_good) {
    int i, full = 1;
    pthread_mutex_lock(&lock);
    for (i = 0; i < MAX_FAULTS && full; i++) {
        if (!faults[i].name) {
            faults[i].name = strdup(name);
            faults[i].code = code;
            faults[i].after = after;
            faults[i].for_good = for_good;
            full = 0;
        }
    }
    pthread_mutex_unlock(&lock);
    return full;
}

/* Lose the device: whatever touches it fails with this code from now on. */
void double_lose(int code) { lost = code; }

void double_recover(void) {
    pthread_mutex_lock(&lock);
    memset(faults, 0, sizeof faults);
    lost = 0;
    pthread_mutex_unlock(&lock);
}

/* Return how often a function was called. */
long double_calls(const char *name) {
    long calls = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_NAMES && called[i].name; i++) {
        if (!strcmp(called[i].name, name)) {
            calls = called[i].calls;
        }
    }
    pthread_mutex_unlock(&lock);
    return calls;
}

/* Return the name of the n-th function that was called at all, or NULL. */
const char *double_called(int n) { return n < MAX_NAMES ? called[n].name : NULL; }

/* Return a counter by name; -1 if there is none of that name. */
long double_count(const char *name) {
    long count = -1;
    pthread_mutex_lock(&lock);
    if (!strcmp(name, "device_blocks") || !strcmp(name, "pinned_blocks")) {
        count = 0;
        for (Block *b = blocks; b; b = b->next) {
            count += b->pinned == (*name == 'p');
        }
    } else if (!strcmp(name, "streams")) {
        count = 0;
        for (Stream *s = streams; s; s = s->next) {
            count++;
        }
    } else if (!strcmp(name, "events")) {
        count = 0;
        for (Event *e = events; e; e = e->next) {
            count++;
        }
    } else if (!strcmp(name, "recordings") || !strcmp(name, "graphs")) {
        count = 0;
        for (Graph *g = graphs; g; g = g->next) {
            count += g->executable == (*name == 'g');
        }
    } else if (!strcmp(name, "capturing")) {
        count = 0;
        for (Stream *s = streams; s; s = s->next) {
            count += s->capture != NULL;
        }
    } else if (!strcmp(name, "retained")) {
        count = 0;
        for (int i = 0; i < 8; i++) {
            count += primary[i].retained;
        }
    } else {
        const struct {
            const char *name;
            long value;
        } plain[] = {
            {"pushes", pushes},
            {"pops", pops},
            {"contexts_created", contexts_created},
            {"on_default_stream", on_default_stream},
            {"pageable_copies", pageable_copies},
            {"freed_in_flight", freed_in_flight},
            {"strangers", strangers},
            {"orphaned_graphs", orphaned_graphs},
            {"depth", depth},
            {"uploaded_bytes", uploaded_bytes},
        };
        for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
            if (!strcmp(name, plain[i].name)) {
                count = plain[i].value;
            }
        }
    }
    pthread_mutex_unlock(&lock);
    return count;
}

/* ---- the driver ---- */

CUresult cuInit(unsigned flags) {
    BEGIN("cuInit")
    if (flags) {
        FAIL(INVALID_VALUE);
    }
    if (setting("DOUBLE_DEVICES", 1) < 1) {
        FAIL(NO_DEVICE);
    }
    initialized = 1;
    END
}

CUresult cuDriverGetVersion(int *version) {
    BEGIN("cuDriverGetVersion")
    *version = (int)setting("DOUBLE_DRIVER", 12060);
    END
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    switch (error) {
    case SUCCESS: *text = "no error"; break;
    case INVALID_VALUE: *text = "invalid argument"; break;
    case OUT_OF_MEMORY: *text = "out of memory"; break;
    case NOT_INITIALIZED: *text = "initialization error"; break;
    case NO_DEVICE: *text = "no CUDA-capable device is detected"; break;
    case INVALID_DEVICE: *text = "invalid device ordinal"; break;
    case INVALID_CONTEXT: *text = "invalid device context"; break;
    case INVALID_HANDLE: *text = "invalid resource handle"; break;
    case NOT_READY: *text = "device not ready"; break;
    case ILLEGAL_ADDRESS: *text = "an illegal memory access was encountered"; break;
    case CONTEXT_IS_DESTROYED: *text = "context is destroyed"; break;
    case LAUNCH_FAILED: *text = "unspecified launch failure"; break;
    case ILLEGAL_STATE: *text = "the operation cannot be performed in the present state"; break;
    case CAPTURE_UNSUPPORTED: *text = "operation not permitted when stream is capturing"; break;
    case CAPTURE_INVALIDATED: *text = "operation failed due to a previous error during capture"; break;
    case CAPTURE_WRONG_THREAD: *text = "attempt to terminate a thread-local capture sequence from another thread"; break;
    case NOT_SUPPORTED: *text = "operation not supported"; break;
    default: *text = "unknown error";
    }
    return SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) {
    (void)error;
    *text = "CUDA_ERROR";
    return SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    BEGIN("cuDeviceGetCount")
    *count = (int)setting("DOUBLE_DEVICES", 1);
    END
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    BEGIN("cuDeviceGet")
    if (ordinal < 0 || ordinal >= setting("DOUBLE_DEVICES", 1)) {
        FAIL(INVALID_DEVICE);
    }
    *device = ordinal;
    END
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    const char *stated = getenv("DOUBLE_NAME");
    (void)device;
    BEGIN("cuDeviceGetName")
    snprintf(name, size, "%s", stated ? stated : "Orin");
    END
}

CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
    (void)device;
    BEGIN("cuDeviceComputeCapability")
    *major = (int)setting("DOUBLE_CAPABILITY", 87) / 10;
    *minor = (int)setting("DOUBLE_CAPABILITY", 87) % 10;
    END
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    (void)device;
    BEGIN("cuDeviceGetAttribute")
    *value = attribute == 75 ? (int)setting("DOUBLE_CAPABILITY", 87) / 10 /* its major and minor number */
             : attribute == 76 ? (int)setting("DOUBLE_CAPABILITY", 87) % 10
                               : 0;
    END
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    (void)device;
    BEGIN("cuDeviceTotalMem")
    *bytes = (size_t)setting("DOUBLE_MEMORY", 1L << 30);
    END
}

/* ---- contexts ---- */

CUresult cuDevicePrimaryCtxRetain(Context **context, CUdevice device) {
    BEGIN("cuDevicePrimaryCtxRetain")
    if (!initialized) {
        FAIL(NOT_INITIALIZED);
    }
    primary[device].device = device;
    primary[device].primary = 1;
    primary[device].retained++;
    *context = &primary[device];
    END
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    BEGIN("cuDevicePrimaryCtxRelease")
    if (primary[device].retained < 1) {
        FAIL(INVALID_CONTEXT);
    }
    primary[device].retained--;
    END
}

static CUresult create_context(Context **context, CUdevice device) {
    BEGIN("cuCtxCreate")
    if (depth == MAX_DEPTH) {
        FAIL(INVALID_CONTEXT);
    }
    *context = calloc(1, sizeof **context);
    (*context)->device = device;
    (*context)->retained = 1;
    stack[depth++] = *context;
    contexts_created++;
    END
}

CUresult cuCtxCreate_v2(Context **context, unsigned flags, CUdevice device) {
    (void)flags;
    return create_context(context, device);
}

CUresult cuCtxCreate_v4(Context **context, void *parameters, unsigned flags, CUdevice device) {
    (void)parameters, (void)flags;
    return create_context(context, device);
}

CUresult cuCtxPushCurrent_v2(Context *context) {
    BEGIN("cuCtxPushCurrent")
    code = alive(context);
    if (!code && depth == MAX_DEPTH) {
        code = INVALID_CONTEXT;
    }
    if (!code) {
        stack[depth++] = context;
        pushes++;
    }
    END
}

CUresult cuCtxPopCurrent_v2(Context **context) {
    BEGIN("cuCtxPopCurrent")
    if (!depth) {
        FAIL(INVALID_CONTEXT);
    }
    depth--;
    pops++;
    if (context) {
        *context = stack[depth];
    }
    END
}

CUresult cuCtxGetCurrent(Context **context) {
    BEGIN("cuCtxGetCurrent")
    *context = current();
    END
}

CUresult cuCtxSetCurrent(Context *context) {
    BEGIN("cuCtxSetCurrent")
    depth -= depth > 0;
    if (context) {
        stack[depth++] = context;
    }
    END
}

CUresult cuCtxGetDevice(CUdevice *device) {
    IN_CONTEXT("cuCtxGetDevice")
    *device = current()->device;
    END
}

CUresult cuCtxSynchronize(void) {
    IN_CONTEXT("cuCtxSynchronize")
    code = whole_context(current());
    if (code) {
        goto end;
    }
    for (Stream *s = streams; s; s = s->next) {
        if (s->owner == current()) {
            drain(s);
        }
    }
    code = lost;
    END
}

/* ---- memory ---- */

CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    IN_CONTEXT("cuMemGetInfo")
    *total = (size_t)setting("DOUBLE_MEMORY", 1L << 30);
    *available = *total - (size_t)device_bytes;
    END
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    void *start = NULL;
    IN_CONTEXT("cuMemAlloc")
    if (unsafe()) {
        FAIL(CAPTURE_UNSUPPORTED);
    }
    code = take(&start, size, 0);
    *address = (CUdeviceptr)(uintptr_t)start;
    END
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    IN_CONTEXT("cuMemFree")
    if (unsafe()) {
        FAIL(CAPTURE_UNSUPPORTED);
    }
    code = give((void *)(uintptr_t)address, 0);
    END
}

CUresult cuMemHostAlloc(void **start, size_t size, unsigned flags) {
    (void)flags;
    IN_CONTEXT("cuMemHostAlloc")
    if (unsafe()) {
        FAIL(CAPTURE_UNSUPPORTED);
    }
    code = take(start, size, 1);
    END
}

CUresult cuMemAllocHost_v2(void **start, size_t size) { return cuMemHostAlloc(start, size, 0); }

CUresult cuMemFreeHost(void *start) {
    IN_CONTEXT("cuMemFreeHost")
    if (unsafe()) {
        FAIL(CAPTURE_UNSUPPORTED);
    }
    code = give(start, 1);
    END
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *stream) {
    IN_CONTEXT("cuMemcpyHtoDAsync")
    uploaded_bytes += (long)size;
    code = copy((void *)(uintptr_t)to, from, size, stream, from);
    END
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *stream) {
    IN_CONTEXT("cuMemcpyDtoHAsync")
    code = copy(to, (void *)(uintptr_t)from, size, stream, to);
    END
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size) {
    IN_CONTEXT("cuMemcpyHtoD")
    code = copy((void *)(uintptr_t)to, from, size, NULL, from);
    END
}

CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) {
    IN_CONTEXT("cuMemcpyDtoH")
    code = copy(to, (void *)(uintptr_t)from, size, NULL, to);
    END
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, void *stream) {
    IN_CONTEXT("cuMemcpyDtoDAsync")
    code = copy((void *)(uintptr_t)to, (void *)(uintptr_t)from, size, stream, NULL);
    END
}

/* ---- streams and events ---- */

CUresult cuStreamCreate(Stream **stream, unsigned flags) {
    IN_CONTEXT("cuStreamCreate")
    *stream = calloc(1, sizeof **stream);
    (*stream)->non_blocking = flags & 1;
    (*stream)->owner = current();
    (*stream)->next = streams;
    streams = *stream;
    END
}

CUresult cuStreamDestroy_v2(Stream *stream) {
    IN_CONTEXT("cuStreamDestroy")
    for (Stream **at = &streams; *at; at = &(*at)->next) {
        if (*at == stream) {
            strangers += stream->owner != current();
            for (Graph *g = graphs; g; g = g->next) {
                orphaned_graphs += g->executable && g->origin == stream;
            }
            if (stream->capture) {
                destroy_graph(stream->capture, 0);
            }
            drain(stream);
            *at = stream->next;
            free(stream);
            goto end;
        }
    }
    code = INVALID_HANDLE;
    END
}

CUresult cuStreamSynchronize(Stream *stream) {
    IN_CONTEXT("cuStreamSynchronize")
    if (!stream) {
        on_default_stream++;
    } else if (!stream_of(stream)) {
        FAIL(INVALID_HANDLE);
    } else {
        code = one_stream(stream);
        if (!code) {
            drain(stream);
            code = lost;
        }
    }
    END
}

CUresult cuStreamQuery(Stream *stream) {
    IN_CONTEXT("cuStreamQuery")
    code = !stream_of(stream) ? INVALID_HANDLE : one_stream(stream);
    code = code ? code : stream->first ? NOT_READY : SUCCESS;
    END
}

CUresult cuLaunchHostFunc(Stream *stream, CUhostFn run, void *argument) {
    IN_CONTEXT("cuLaunchHostFunc")
    if (!stream_of(stream)) {
        FAIL(INVALID_HANDLE);
    }
    code = submit(stream, (Work){.run = run, .argument = argument});
    END
}

CUresult cuEventCreate(Event **event, unsigned flags) {
    (void)flags;
    IN_CONTEXT("cuEventCreate")
    *event = calloc(1, sizeof **event);
    (*event)->owner = current();
    (*event)->next = events;
    events = *event;
    END
}

CUresult cuEventDestroy_v2(Event *event) {
    IN_CONTEXT("cuEventDestroy")
    for (Event **at = &events; *at; at = &(*at)->next) {
        if (*at == event) {
            strangers += event->owner != current();
            if (event->recorded && stream_of(event->stream)) {
                drain(event->stream);
            }
            *at = event->next;
            free(event);
            goto end;
        }
    }
    code = INVALID_HANDLE;
    END
}

CUresult cuEventRecord(Event *event, Stream *stream) {
    IN_CONTEXT("cuEventRecord")
    if (!event_of(event) || !stream_of(stream)) {
        FAIL(INVALID_HANDLE);
    }
    if (stream->capture) {
        stream->invalid = 1; /* CUDA would carry the capture over by it; nobody here wants that */
        FAIL(CAPTURE_UNSUPPORTED);
    }
    event->stream = stream;
    event->recorded = 1;
    event->done = 0;
    enqueue(stream, (Work){.event = event});
    END
}

CUresult cuEventSynchronize(Event *event) {
    IN_CONTEXT("cuEventSynchronize")
    if (!event_of(event)) {
        FAIL(INVALID_HANDLE);
    }
    if (event->recorded && !event->done) {
        drain(event->stream);
    }
    code = lost;
    END
}

CUresult cuEventQuery(Event *event) {
    IN_CONTEXT("cuEventQuery")
    code = !event_of(event) ? INVALID_HANDLE : event->recorded && !event->done ? NOT_READY : SUCCESS;
    END
}

CUresult cuEventElapsedTime(float *milliseconds, Event *start, Event *end_) {
    IN_CONTEXT("cuEventElapsedTime")
    if (!event_of(start) || !event_of(end_) || !start->recorded || !end_->recorded) {
        FAIL(INVALID_HANDLE);
    }
    if (!start->done || !end_->done) {
        FAIL(NOT_READY);
    }
    *milliseconds = (float)(end_->when - start->when);
    END
}

CUresult cuEventElapsedTime_v2(float *milliseconds, Event *start, Event *end_) {
    return cuEventElapsedTime(milliseconds, start, end_);
}

/* ---- graphs ---- */

CUresult cuStreamBeginCapture_v2(Stream *stream, int mode) {
    IN_CONTEXT("cuStreamBeginCapture")
    if (!stream_of(stream)) {
        FAIL(INVALID_HANDLE);
    }
    if (stream->capture) {
        FAIL(ILLEGAL_STATE);
    }
    strangers += stream->owner != current();
    on_default_stream += !stream->non_blocking; /* the default stream of everybody would be forbidden meanwhile */
    stream->capture = new_graph(stream, 0);
    stream->capturer = pthread_self();
    stream->mode = mode;
    stream->invalid = 0;
    END
}

/* Whatever it answers, the capture is over, as in CUDA, unless another thread must end it. */
CUresult cuStreamEndCapture(Stream *stream, Graph **graph) {
    CUresult code;
    pthread_mutex_lock(&lock);
    code = asked("cuStreamEndCapture");
    *graph = NULL;
    if (!stream_of(stream)) {
        FAIL(code ? code : INVALID_HANDLE);
    }
    if (!stream->capture) {
        FAIL(code ? code : ILLEGAL_STATE);
    }
    if (stream->mode != RELAXED && !pthread_equal(stream->capturer, pthread_self())) {
        FAIL(CAPTURE_WRONG_THREAD);
    }
    code = code ? code : lost ? lost : stream->invalid ? CAPTURE_INVALIDATED : SUCCESS;
    if (code) {
        destroy_graph(stream->capture, 0);
    } else {
        *graph = stream->capture;
    }
    stream->capture = NULL;
    END
}

CUresult cuStreamIsCapturing(Stream *stream, int *status) {
    IN_CONTEXT("cuStreamIsCapturing")
    if (!stream_of(stream)) {
        FAIL(INVALID_HANDLE);
    }
    *status = !stream->capture ? 0 : stream->invalid ? 2 : 1;
    END
}

/* cuGraphInstantiate of CUDA 12 and later is this one. */
CUresult cuGraphInstantiateWithFlags(Graph **executable, Graph *graph, unsigned long long flags) {
    (void)flags;
    IN_CONTEXT("cuGraphInstantiate")
    if (!graph_of(graph, 0)) {
        FAIL(INVALID_HANDLE);
    }
    *executable = new_graph(graph->origin, 1);
    for (Work *w = graph->first; w; w = w->next) {
        append(*executable, *w);
    }
    END
}

CUresult cuGraphLaunch(Graph *executable, Stream *stream) {
    IN_CONTEXT("cuGraphLaunch")
    if (!graph_of(executable, 1) || !stream_of(stream)) {
        FAIL(INVALID_HANDLE);
    }
    strangers += stream->owner != current();
    for (Work *w = executable->first; w && !code; w = w->next) {
        code = submit(stream, *w);
    }
    END
}

CUresult cuGraphExecDestroy(Graph *executable) {
    IN_CONTEXT("cuGraphExecDestroy")
    code = destroy_graph(executable, 1);
    END
}

CUresult cuGraphDestroy(Graph *graph) {
    IN_CONTEXT("cuGraphDestroy")
    code = destroy_graph(graph, 0);
    END
}

/* ---- how cuda-python finds the others ---- */

/* Who asks as CUDA 11 or 12 gets the functions as they were then: some have more parameters by now. */
static CUresult find(const char *symbol, void **function, int version) {
    static const char *const suffixes[] = {"_v4", "_v2", ""};
    char name[128];
    void *self;
    Dl_info here;
    *function = NULL;
    if (!dladdr((void *)find, &here) || !(self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD))) {
        return NOT_FOUND;
    }
    size_t newest = version < 13000 ? 1 : 0;
    if (version < 12000 && !strcmp(symbol, "cuGetProcAddress")) {
        newest = 2;
    }
    if (version >= 12000 && !strcmp(symbol, "cuGraphInstantiate")) {
        symbol = "cuGraphInstantiateWithFlags"; /* CUDA 11's had a log */
    }
    for (size_t i = newest; i < sizeof suffixes / sizeof *suffixes && !*function; i++) {
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *function = dlsym(self, name);
    }
    dlclose(self);
    return *function ? SUCCESS : NOT_FOUND;
}

CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
    (void)flags;
    return find(symbol, function, version);
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    CUresult code = cuGetProcAddress(symbol, function, version, flags);
    if (status) {
        *status = code ? 1 : 0;
    }
    return code;
}

/* ---- what pycuda links to and the session never calls; the loader wants every name ---- */

#define ABSENT(name)                                                                                                   \
    CUresult name(void) { return NOT_SUPPORTED; }
ABSENT(cuArray3DCreate_v2)
ABSENT(cuArray3DGetDescriptor_v2)
ABSENT(cuArrayCreate_v2)
ABSENT(cuArrayDestroy)
ABSENT(cuArrayGetDescriptor_v2)
ABSENT(cuCtxAttach)
ABSENT(cuCtxDetach)
ABSENT(cuCtxDisablePeerAccess)
ABSENT(cuCtxEnablePeerAccess)
ABSENT(cuCtxGetApiVersion)
ABSENT(cuCtxGetCacheConfig)
ABSENT(cuCtxGetLimit)
ABSENT(cuCtxGetSharedMemConfig)
ABSENT(cuCtxSetCacheConfig)
ABSENT(cuCtxSetLimit)
ABSENT(cuCtxSetSharedMemConfig)
ABSENT(cuDeviceCanAccessPeer)
ABSENT(cuDeviceGetByPCIBusId)
ABSENT(cuDeviceGetPCIBusId)
ABSENT(cuFuncGetAttribute)
ABSENT(cuFuncSetAttribute)
ABSENT(cuFuncSetBlockShape)
ABSENT(cuFuncSetCacheConfig)
ABSENT(cuFuncSetSharedSize)
ABSENT(cuIpcCloseMemHandle)
ABSENT(cuIpcGetEventHandle)
ABSENT(cuIpcGetMemHandle)
ABSENT(cuIpcOpenEventHandle)
ABSENT(cuIpcOpenMemHandle_v2)
ABSENT(cuLaunch)
ABSENT(cuLaunchGrid)
ABSENT(cuLaunchGridAsync)
ABSENT(cuLaunchKernel)
ABSENT(cuLinkAddData_v2)
ABSENT(cuLinkAddFile_v2)
ABSENT(cuLinkComplete)
ABSENT(cuLinkCreate_v2)
ABSENT(cuLinkDestroy)
ABSENT(cuMemAllocManaged)
ABSENT(cuMemAllocPitch_v2)
ABSENT(cuMemGetAddressRange_v2)
ABSENT(cuMemHostGetDevicePointer_v2)
ABSENT(cuMemHostGetFlags)
ABSENT(cuMemHostRegister_v2)
ABSENT(cuMemHostUnregister)
ABSENT(cuMemcpy2DAsync_v2)
ABSENT(cuMemcpy2DUnaligned_v2)
ABSENT(cuMemcpy2D_v2)
ABSENT(cuMemcpy3DAsync_v2)
ABSENT(cuMemcpy3DPeer)
ABSENT(cuMemcpy3DPeerAsync)
ABSENT(cuMemcpy3D_v2)
ABSENT(cuMemcpyAtoA_v2)
ABSENT(cuMemcpyAtoD_v2)
ABSENT(cuMemcpyAtoH_v2)
ABSENT(cuMemcpyDtoA_v2)
ABSENT(cuMemcpyDtoD_v2)
ABSENT(cuMemcpyHtoA_v2)
ABSENT(cuMemcpyPeer)
ABSENT(cuMemcpyPeerAsync)
ABSENT(cuMemsetD16Async)
ABSENT(cuMemsetD16_v2)
ABSENT(cuMemsetD2D16Async)
ABSENT(cuMemsetD2D16_v2)
ABSENT(cuMemsetD2D32Async)
ABSENT(cuMemsetD2D32_v2)
ABSENT(cuMemsetD2D8Async)
ABSENT(cuMemsetD2D8_v2)
ABSENT(cuMemsetD32Async)
ABSENT(cuMemsetD32_v2)
ABSENT(cuMemsetD8Async)
ABSENT(cuMemsetD8_v2)
ABSENT(cuModuleGetFunction)
ABSENT(cuModuleGetGlobal_v2)
ABSENT(cuModuleGetSurfRef)
ABSENT(cuModuleGetTexRef)
ABSENT(cuModuleLoad)
ABSENT(cuModuleLoadData)
ABSENT(cuModuleLoadDataEx)
ABSENT(cuModuleUnload)
ABSENT(cuParamSetSize)
ABSENT(cuParamSetTexRef)
ABSENT(cuParamSetf)
ABSENT(cuParamSeti)
ABSENT(cuParamSetv)
ABSENT(cuProfilerInitialize)
ABSENT(cuProfilerStart)
ABSENT(cuProfilerStop)
ABSENT(cuStreamAttachMemAsync)
ABSENT(cuStreamWaitEvent)
ABSENT(cuSurfRefGetArray)
ABSENT(cuSurfRefSetArray)
ABSENT(cuTexRefCreate)
ABSENT(cuTexRefDestroy)
ABSENT(cuTexRefGetAddressMode)
ABSENT(cuTexRefGetAddress_v2)
ABSENT(cuTexRefGetArray)
ABSENT(cuTexRefGetFilterMode)
ABSENT(cuTexRefGetFlags)
ABSENT(cuTexRefGetFormat)
ABSENT(cuTexRefSetAddress2D_v3)
ABSENT(cuTexRefSetAddressMode)
ABSENT(cuTexRefSetAddress_v2)
ABSENT(cuTexRefSetArray)
ABSENT(cuTexRefSetFilterMode)
ABSENT(cuTexRefSetFlags)
ABSENT(cuTexRefSetFormat)
