/* Two CUDA devices that are not there: what onnxruntime-gpu asks of the driver, CUDA's runtime, cuBLAS and cuDNN,
 * answered as GPUs of compute capability 9.0 would, with their memory on the host and kernels that compute nothing. They
 * count what is launched, waited for and copied to the host.
 *
 * One library under all the names: loaded before everything else it answers for the CUDA runtime and cuBLAS, under the
 * names of NVIDIA's libraries it is what the provider is linked with, and as ONNX Runtime's TensorRT provider it
 * answers with the CUDA provider's (see GetProvider). `pretend.py` compiles it, adding a DONE line for whatever else
 * the provider wants to be linked with. No code of NVIDIA's or ONNX Runtime's is in it; layouts and numbers are those
 * of the public headers of CUDA 13 (driver_types.h, library_types.h).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DONE(name) \
  int name() { return 0; }
#define GIVES(name)       \
  int name(void **out) {  \
    *out = (void *)64;    \
    return 0;             \
  }

enum { NUM_GPUS = 2, SM_MAJOR = 9, WARP = 32, NUM_SM = 132 };
enum { BLOCK_BYTES = 49152, SM_BYTES = 233472, OPTIN_BYTES = 232448 };
static const size_t MEMORY_BYTES = 4ul << 30;

/* ---- the device ---- */

struct properties { /* cudaDeviceProp of CUDA 13: its first fields, and its size */
  char name[256], uuid[16], luid[8];
  unsigned node_mask;
  size_t memory_bytes, block_bytes;
  int block_registers, warp;
  size_t pitch;
  int block_threads, block_size[3], grid_size[3];
  size_t constant_bytes;
  int major, minor;
  size_t alignments[2];
  int num_sm;
  char rest[620];
};

int cudaGetDeviceProperties(struct properties *of, int device) {
  memset(of, 0, sizeof *of);
  strcpy(of->name, "pretended");
  of->memory_bytes = MEMORY_BYTES, of->block_bytes = BLOCK_BYTES, of->block_registers = 65536, of->warp = WARP;
  of->block_threads = of->block_size[0] = of->block_size[1] = 1024, of->block_size[2] = 64;
  of->grid_size[0] = 2147483647, of->grid_size[1] = of->grid_size[2] = 65535;
  of->major = SM_MAJOR, of->num_sm = NUM_SM;
  return 0;
}

int cudaDeviceGetAttribute(int *value, int which, int device) {
  switch (which) { /* cudaDeviceAttr */
    case 8: *value = BLOCK_BYTES; break;
    case 10: *value = WARP; break;
    case 16: *value = NUM_SM; break;
    case 39: *value = 2048; break; /* threads of a multiprocessor */
    case 75: *value = SM_MAJOR; break;
    case 81: *value = SM_BYTES; break;
    case 97: *value = OPTIN_BYTES; break;
    default: *value = 0;
  }
  return 0;
}

/* The driver, which answers the same. */
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = NUM_GPUS, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuDeviceGetName(char *name, int room, int device) { return strncpy(name, "pretended", room), 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = MEMORY_BYTES, 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { return cudaDeviceGetAttribute(value, which, device); }
int cuDeviceGetPCIBusId(char *text, int room, int device) { return 100; }
DONE(cuInit)
GIVES(cuDevicePrimaryCtxRetain)
DONE(cuDevicePrimaryCtxRelease_v2)
DONE(cuCtxPushCurrent_v2)
GIVES(cuCtxPopCurrent_v2)

static __thread int current;

int cudaGetDevice(int *device) { return *device = current, 0; }
int cudaSetDevice(int device) {
  if (device < 0 || device >= NUM_GPUS) return 101; /* cudaErrorInvalidDevice */
  return current = device, 0;
}
int cudaGetDeviceCount(int *count) { return *count = NUM_GPUS, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
long cudnnGetVersion(void) { return 91000; }
const char *cudaGetErrorName(int code) { return code == 2 ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown"; }
const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "unknown error"; }

/* ---- what was asked of it ---- */

static long launches, waits, bytes_to_host;

void m0kit_counted(long *to) { to[0] = launches, to[1] = waits, to[2] = bytes_to_host; }

#define LAUNCH(name) \
  int name() { return launches++, 0; }
#define WAIT(name) \
  int name() { return waits++, 0; }

static int copy(void *to, const void *from, size_t bytes, int kind) {
  if (kind == 2 /* cudaMemcpyDeviceToHost */) bytes_to_host += bytes;
  return memmove(to, from, bytes), 0;
}

/* ---- its memory ---- */

static size_t used;

int cudaMemGetInfo(size_t *left, size_t *total) { return *left = MEMORY_BYTES - used, *total = MEMORY_BYTES, 0; }
int cudaMallocHost(void **to, size_t bytes) { return *to = aligned_alloc(256, (bytes / 256 + 1) * 256), 0; }
int cudaHostAlloc(void **to, size_t bytes, unsigned flags) { return cudaMallocHost(to, bytes); }
int cudaFreeHost(void *what) { return free(what), 0; }
int cudaFree(void *what) { return used -= malloc_usable_size(what), free(what), 0; }
int cudaMalloc(void **to, size_t bytes) {
  *to = NULL;
  if (bytes > MEMORY_BYTES - used) return 2; /* cudaErrorMemoryAllocation */
  return cudaMallocHost(to, bytes), used += malloc_usable_size(*to), 0;
}
int cudaMemset(void *to, int value, size_t bytes) { return memset(to, value, bytes), 0; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { return memset(to, value, bytes), 0; }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { return waits++, copy(to, from, bytes, kind); }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  return copy(to, from, bytes, kind);
}

int cudaMemcpy2D(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t rows, int kind) {
  for (size_t row = 0; row < rows; row++) copy(to + row * to_pitch, from + row * from_pitch, width, kind);
  return waits++, 0;
}

int cudaPointerGetAttributes(void *to, const void *pointer) {
  struct { /* cudaPointerAttributes */
    int type, device;
    const void *on_device, *on_host;
  } found = {2 /* device memory */, current, pointer, NULL};
  return memcpy(to, &found, sizeof found), 0;
}

int cuMemGetInfo_v2(size_t *left, size_t *total) { return cudaMemGetInfo(left, total); }

/* ---- its queues and kernels ---- */

GIVES(cudaStreamCreate)
GIVES(cudaStreamCreateWithFlags)
GIVES(cudaEventCreate)
GIVES(cudaEventCreateWithFlags)
GIVES(cublasCreate_v2)
GIVES(cublasLtCreate)
GIVES(cublasLtMatmulDescCreate)
GIVES(cublasLtMatmulPreferenceCreate)
GIVES(cublasLtMatrixLayoutCreate)
GIVES(cudnnCreate)
DONE(cudnnSetStream)
DONE(cudnnDestroy)

LAUNCH(cudaLaunchKernel)
LAUNCH(__cudaLaunchKernel)
LAUNCH(cudaLaunchKernelExC)
LAUNCH(cudaLaunchCooperativeKernel)
LAUNCH(cublasGemmEx)
LAUNCH(cublasGemmBatchedEx)
LAUNCH(cublasGemmStridedBatchedEx)
LAUNCH(cublasSgemm_v2)
LAUNCH(cublasSgemmBatched)
LAUNCH(cublasSgemmStridedBatched)
LAUNCH(cublasLtMatmul)
WAIT(cudaStreamSynchronize)
WAIT(cudaEventSynchronize)
WAIT(cudaDeviceSynchronize)

int cudaLaunchHostFunc(void *stream, void (*call)(void *), void *with) { return call(with), 0; }
int cudaStreamIsCapturing(void *stream, int *status) { return *status = 0; }
int cudaEventElapsedTime(float *milliseconds) { return *milliseconds = 1, 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return *blocks = 1, 0; }

int cudaFuncGetAttributes(void *to, const void *kernel) {
  struct { /* cudaFuncAttributes: its first fields, and its size */
    size_t shared_bytes, constant_bytes, local_bytes;
    int block_threads, registers, ptx, binary;
    char rest[104];
  } found = {0, 0, 0, 1024, 32, 90, 90};
  return memcpy(to, &found, sizeof found), 0;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, char *results, int *found) {
  return memset(results, 0, 64 /* cublasLtMatmulAlgo_t */), *found = 1, 0;
}

/* ---- ONNX Runtime's TensorRT provider ----
 *
 * onnxruntime's list of kernels asks every provider it was built with, and falls over TensorRT's, whose own libraries
 * are not there. A provider is an object whose second virtual function makes a factory for a device's number, and whose
 * first makes one from options, all zeros for the defaults (struct Provider in ONNX Runtime's provider_host_api.h). */

typedef void *(*virtual)();
struct provider {
  virtual *functions;
};

static void *factory(void *out, struct provider *self, int device) {
  static const char defaults[65536];
  char path[4096];
  snprintf(path, sizeof path, "%s/libonnxruntime_providers_cuda.so", getenv("M0KIT_PRETENDED"));
  void *library = dlopen(path, RTLD_LAZY);
  struct provider *(*get)(void) = library ? (struct provider * (*)(void)) dlsym(library, "GetProvider") : NULL;
  if (get == NULL) {
    fprintf(stderr, "no CUDA provider in %s: %s\n", path, dlerror());
    exit(1);
  }
  struct provider *cuda = get();
  return cuda->functions[0](out, cuda, defaults);
}

static void *nothing() { return NULL; }

struct provider *GetProvider(void) {
  static virtual functions[32]; /* more than there are */
  static struct provider provider = {functions};
  for (int i = 0; i < 32; i++) functions[i] = nothing;
  functions[1] = (virtual)factory;
  return &provider;
}
