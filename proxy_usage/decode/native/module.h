/* What the files of the extension share. */

#ifndef FOLD_MODULE_H
#define FOLD_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "row.h"

/* Rows of one message, still closed: where they are in it. A sequence of bytes, each made when it is asked for. */
typedef struct {
    PyObject_HEAD
    PyObject *raw; /* bytes */
    Py_ssize_t count;
    uint32_t *places; /* start and size of each */
} spans;

extern PyTypeObject spans_type;
extern PyTypeObject walker_type;
extern PyTypeObject rows_type;

PyObject *scan(PyObject *module, PyObject *arguments);

static inline span spans_get(const spans *self, Py_ssize_t index)
{
    const uint8_t *at = (const uint8_t *)PyBytes_AS_STRING(self->raw) + self->places[2 * index];
    return (span){at, at + self->places[2 * index + 1]};
}

#endif
