/* A walker's sums on their way to Python, some at a time; and the module itself. */

#include "walker.h"

#ifndef FOLD_DIGEST
#define FOLD_DIGEST "unknown"
#endif

static void rows_dealloc(rows *self)
{
    table_free(self->sums);
    PyObject_Free(self);
}

/* The next text of a key, moving `*at` behind it. */
static PyObject *next_text(const uint8_t **at)
{
    size_t size = *(*at)++;
    if (size == LONG) {
        size = (size_t)(*at)[0] | (size_t)(*at)[1] << 8;
        *at += 2;
    }
    PyObject *text = PyBytes_FromStringAndSize((const char *)*at, (Py_ssize_t)size);
    *at += size;
    return text;
}

/* (source, window_ms, rule, value, dimensions, routed, [rows, *amounts]) */
static PyObject *row_tuple(rows *self, const table_row *row)
{
    const uint8_t *at = row->key;
    const table_sum *amounts = table_sums(self->sums, row);
    uint32_t window;
    uint16_t source;
    memcpy(&window, at, 4);
    memcpy(&source, at + 4, 2);
    int rule = at[6] / 2 - MAX_FIELDS, routed = at[6] & 1;
    at += KEY_HEAD;
    PyObject *value = next_text(&at);
    PyObject *dimensions = PyTuple_New(self->dimensions);
    PyObject *sums = PyList_New(1 + self->sums->columns);
    int good = value != NULL && dimensions != NULL && sums != NULL;
    for (unsigned index = 0; good && index < self->dimensions; index++) {
        PyObject *text;
        if (*at == SAME) {
            at++;
            text = Py_NewRef(value);
        } else
            text = next_text(&at);
        good = text != NULL;
        if (good)
            PyTuple_SET_ITEM(dimensions, index, text);
    }
    for (unsigned index = 0; good && index <= self->sums->columns; index++) {
        PyObject *sum = PyLong_FromUnsignedLongLong(index ? amounts[index - 1] : row->count);
        good = sum != NULL;
        if (good)
            PyList_SET_ITEM(sums, index, sum);
    }
    if (!good) {
        Py_XDECREF(value);
        Py_XDECREF(dimensions);
        Py_XDECREF(sums);
        return NULL;
    }
    return Py_BuildValue("HKiNNNN", source, (unsigned long long)window * self->window_ms, rule, value, dimensions,
                         PyBool_FromLong(routed), sums);
}

static PyObject *rows_take(rows *self, PyObject *limit)
{
    Py_ssize_t most = PyLong_AsSsize_t(limit);
    if (most == -1 && PyErr_Occurred())
        return NULL;
    PyObject *list = PyList_New(0);
    const table_row *row;
    while (list != NULL && PyList_GET_SIZE(list) < most
           && (row = table_next(self->sums, &self->chunk, &self->at)) != NULL) {
        PyObject *one = row_tuple(self, row);
        if (one == NULL || PyList_Append(list, one) < 0)
            Py_CLEAR(list);
        Py_XDECREF(one);
        self->left--;
    }
    return list;
}

static Py_ssize_t rows_left(rows *self) { return (Py_ssize_t)self->left; }

static PyMethodDef rows_methods[] = {
    {"take", (PyCFunction)rows_take, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static PySequenceMethods rows_sequence = {.sq_length = (lenfunc)rows_left};

PyTypeObject rows_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "proxy_usage.decode._fold.Rows",
    .tp_doc = "Sums that a walker gave away.",
    .tp_basicsize = sizeof(rows),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_dealloc = (destructor)rows_dealloc,
    .tp_methods = rows_methods,
    .tp_as_sequence = &rows_sequence,
};

static PyMethodDef functions[] = {
    {"scan", scan, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "proxy_usage.decode._fold",
    .m_doc = "The inner loop of the program, compiled: see native/ and fold.py.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__fold(void)
{
    if (PyType_Ready(&spans_type) < 0 || PyType_Ready(&walker_type) < 0 || PyType_Ready(&rows_type) < 0)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL || PyModule_AddObjectRef(module, "Spans", (PyObject *)&spans_type) < 0
        || PyModule_AddObjectRef(module, "Walker", (PyObject *)&walker_type) < 0
        || PyModule_AddObjectRef(module, "Rows", (PyObject *)&rows_type) < 0
        || PyModule_AddStringConstant(module, "DIGEST", FOLD_DIGEST) < 0)
        Py_CLEAR(module);
    return module;
}
