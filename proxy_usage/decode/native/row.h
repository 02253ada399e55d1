/* One row of the access log, read as far as a finished stream needs it. */

#ifndef FOLD_ROW_H
#define FOLD_ROW_H

#include "wire.h"

#define MAX_FIELDS 32
#define MAX_PATH 8

typedef enum { FROM_TAG, FROM_HEADER, FROM_METADATA, FROM_ROUTE, FROM_AUTHORITY, FROM_SNI, FROM_SOURCE } field_kind;

/* A field that a rule or a dimension reads. */
typedef struct {
    field_kind kind;
    unsigned depth; /* of `path` */
    span path[MAX_PATH]; /* keys as a map's entry begins with them: tag, length, text */
} wanted;

typedef struct {
    unsigned count;
    wanted fields[MAX_FIELDS];
} wanted_fields;

typedef struct {
    uint64_t type;
    uint64_t intermediate;
    uint64_t wire_in, wire_out;
    uint64_t body_in, body_out; /* of an HTTP row; what a TCP row received and sent */
    uint64_t start_s, start_ns;
    uint64_t open_s, open_ns;
    int has_duration;
    uint64_t method, status;
    uint32_t flags; /* a bit for each response flag that is set, by field number */
    span route, cluster, sni, authority, details, metadata;
    span values[MAX_FIELDS]; /* of the wanted fields; `at` is NULL where absent */
} row;

/* Returns 0 where the row is odd: then nothing of `found` may be used. */
int read_http(span raw, const wanted_fields *wants, row *found);
int read_tcp(span raw, const wanted_fields *wants, row *found);

#endif
