/* A delegate with the interface of libedgetpu.so.1, for tests without an Edge TPU.

   It takes the operators that the stand-in compiler wrote. Their data is the file that was compiled,
   which an interpreter of the same runtime runs: answers are those of the processor, in its time.

   The structures are those of TensorFlow Lite's common.h, as far as they are used. Python's functions
   are declared here, so that its headers are not needed; they come from the process that loads this. */

#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct { int size; int data[]; } IntArray;

typedef struct {
  int type; void* data; IntArray* dims; float scale; int32_t zero_point; int allocation; size_t bytes;
  const void* mapped; const char* name; void* delegate; int handle; bool stale, variable;
  int quantization; void* quantization_params; void* sparsity; const IntArray* signature;
} Tensor;

typedef struct {
  IntArray *inputs, *outputs, *intermediates, *temporaries;
  void *user_data, *builtin_data; const void* custom; int custom_size;
} Node;

typedef struct Context Context;
typedef struct Delegate Delegate;

typedef struct {
  void* (*init)(Context*, const char*, size_t);
  void (*free)(Context*, void*);
  int (*prepare)(Context*, Node*);
  int (*invoke)(Context*, Node*);
  const char* (*profiling)(const Context*, const Node*);
  int32_t builtin_code; const char* custom_name; int version;
  void *external, *async; uint64_t inplace;
} Registration;

struct Context {
  size_t n_tensors;
  int (*plan)(Context*, IntArray**);
  Tensor* tensors;
  void *impl, *resize, *report, *add;
  int (*node)(Context*, int, Node**, Registration**);
  int (*replace)(Context*, Registration, const IntArray*, Delegate*);
};

struct Delegate {
  void* data;
  int (*prepare)(Context*, Delegate*);
  void *from_handle, *to_handle, *free_handle; int64_t flags; void* builder;
};

typedef struct { Delegate* delegate; IntArray *nodes, *inputs, *outputs; } DelegateParams;

typedef struct PyObject PyObject;
extern int PyGILState_Ensure(void);
extern void PyGILState_Release(int);
extern PyObject *PyImport_AddModule(const char*), *PyModule_GetDict(PyObject*), *PyBytes_FromStringAndSize(const char*, long);
extern PyObject *PyRun_String(const char*, int, PyObject*, PyObject*), *PyObject_CallMethod(PyObject*, const char*, const char*, ...);
extern char* PyBytes_AsString(PyObject*);
extern void PyErr_Print(void), Py_DecRef(PyObject*);

static const char kProgram[] =
    "import numpy as np\n"
    "from ai_edge_litert.interpreter import Interpreter\n"
    "def open(data):\n"
    "    interpreter = Interpreter(model_content=data)\n"
    "    interpreter.allocate_tensors()\n"
    "    return interpreter\n"
    "def run(interpreter, data):\n"
    "    given, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]\n"
    "    interpreter.set_tensor(given['index'], np.frombuffer(data, given['dtype']).reshape(given['shape']))\n"
    "    interpreter.invoke()\n"
    "    return interpreter.get_tensor(answer['index']).tobytes()\n";

static PyObject* module(void) {
  static PyObject* made = NULL;
  if (!made) {
    PyObject* names = PyModule_GetDict(PyImport_AddModule("edgetpu_stand_in_runtime"));
    if (!PyRun_String(kProgram, 257, names, names)) PyErr_Print();
    made = PyImport_AddModule("edgetpu_stand_in_runtime");
  }
  return made;
}

static void* init(Context* context, const char* buffer, size_t length) {
  const DelegateParams* params = (const DelegateParams*)buffer;
  Node* node;
  Registration* registration;
  context->node(context, params->nodes->data[0], &node, &registration);
  int held = PyGILState_Ensure();
  PyObject* bytes = PyBytes_FromStringAndSize(node->custom, node->custom_size);
  PyObject* interpreter = PyObject_CallMethod(module(), "open", "O", bytes);
  if (!interpreter) PyErr_Print();
  Py_DecRef(bytes);
  PyGILState_Release(held);
  return interpreter;
}

static void release(Context* context, void* interpreter) {
  int held = PyGILState_Ensure();
  Py_DecRef(interpreter);
  PyGILState_Release(held);
}

static int prepare(Context* context, Node* node) { return node->user_data ? 0 : 1; }

/* A stick whose file was removed is unplugged: what has it open fails until it is opened anew. */
static int held_file = -1;

static int invoke(Context* context, Node* node) {
  struct stat file;
  if (held_file >= 0 && !fstat(held_file, &file) && !file.st_nlink) return 1;
  Tensor *given = &context->tensors[node->inputs->data[0]], *answer = &context->tensors[node->outputs->data[0]];
  int held = PyGILState_Ensure();
  PyObject* bytes = PyBytes_FromStringAndSize(given->data, given->bytes);
  PyObject* result = PyObject_CallMethod(module(), "run", "OO", node->user_data, bytes);
  if (result) memcpy(answer->data, PyBytes_AsString(result), answer->bytes);
  else PyErr_Print();
  Py_DecRef(bytes);
  Py_DecRef(result);
  PyGILState_Release(held);
  return result ? 0 : 1;
}

static int take(Context* context, Delegate* delegate) {
  IntArray* plan;
  context->plan(context, &plan);
  IntArray* taken = malloc(sizeof(IntArray) + plan->size * sizeof(int));
  taken->size = 0;
  for (int i = 0; i < plan->size; i++) {
    Node* node;
    Registration* registration;
    context->node(context, plan->data[i], &node, &registration);
    if (registration->custom_name && !strcmp(registration->custom_name, "edgetpu-custom-op"))
      taken->data[taken->size++] = plan->data[i];
  }
  if (taken->size && getenv("STAND_IN_FOREIGN")) raise(SIGSEGV);
  Registration registration = {init, release, prepare, invoke};
  registration.custom_name = "edgetpu-custom-op";
  registration.version = 1;
  int status = context->replace(context, registration, taken, delegate);
  free(taken);
  return status;
}

/* A process has a stick to itself while it has delegates there; without a name the first free one is taken. */
static char held[16] = "";
static int holders = 0;

static bool hold(const char* wanted) {
  const char* directory = getenv("STAND_IN_STICKS");
  if (!directory) return true;
  if (holders && (!wanted || !strcmp(held, wanted))) return ++holders;
  for (int i = 0; i < 4 && !holders; i++) {
    char path[512];
    snprintf(held, sizeof held, "usb:%d", i);
    if (wanted && strcmp(held, wanted)) continue;
    snprintf(path, sizeof path, "%s/%s", directory, held);
    held_file = open(path, O_RDWR | O_CLOEXEC);
    if (held_file >= 0 && !flock(held_file, LOCK_EX | LOCK_NB)) return ++holders;
    if (held_file >= 0) close(held_file);
  }
  return false;
}

Delegate* tflite_plugin_create_delegate(const char* const* keys, const char* const* values, size_t n,
                                        void (*report)(const char*)) {
  const char* wanted = NULL;
  for (size_t i = 0; i < n; i++)
    if (!strcmp(keys[i], "device")) wanted = values[i];
  if (getenv("STAND_IN_NO_DEVICE") || !hold(wanted)) {
    report("Failed to load delegate");
    return NULL;
  }
  Delegate* delegate = calloc(1, sizeof(Delegate));
  delegate->prepare = take;
  delegate->flags = 1; /* dynamic tensors, as the real one: else operators are prepared before it takes them */
  return delegate;
}

void tflite_plugin_destroy_delegate(Delegate* delegate) {
  if (holders && !--holders) {
    close(held_file);
    held_file = -1;
  }
  free(delegate);
}
