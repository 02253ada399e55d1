#include "table.h"

#include <stdlib.h>
#include <string.h>

#define CHUNK_BITS 18
#define CHUNK ((size_t)1 << CHUNK_BITS)
#define MAX_CHUNKS ((uint32_t)1 << (32 - (CHUNK_BITS - ROW_BITS)))
#define FIRST_SLOTS 16

static inline uint64_t rotated(uint64_t value, int by) { return value << by | value >> (64 - by); }

static inline uint64_t word_at(const uint8_t *at)
{
    uint64_t word;
    memcpy(&word, at, 8);
    return word;
}

#define SIP_ROUND                                                                                                      \
    do {                                                                                                               \
        v0 += v1; v1 = rotated(v1, 13); v1 ^= v0; v0 = rotated(v0, 32);                                                \
        v2 += v3; v3 = rotated(v3, 16); v3 ^= v2;                                                                      \
        v0 += v3; v3 = rotated(v3, 21); v3 ^= v0;                                                                      \
        v2 += v1; v1 = rotated(v1, 17); v1 ^= v2; v2 = rotated(v2, 32);                                                \
    } while (0)

uint64_t hash_bytes(const hash_key *key, const uint8_t *at, size_t size)
{
    uint64_t v0 = key->secret[0] ^ 0x736f6d6570736575u, v1 = key->secret[1] ^ 0x646f72616e646f6du;
    uint64_t v2 = key->secret[0] ^ 0x6c7967656e657261u, v3 = key->secret[1] ^ 0x7465646279746573u;
    uint64_t last = (uint64_t)size << 56;
    for (; size >= 8; size -= 8, at += 8) {
        uint64_t word = word_at(at);
        v3 ^= word;
        SIP_ROUND;
        v0 ^= word;
    }
    for (size_t index = 0; index < size; index++)
        last |= (uint64_t)at[index] << (8 * index);
    v3 ^= last;
    SIP_ROUND;
    v0 ^= last;
    v2 ^= 0xff;
    SIP_ROUND;
    SIP_ROUND;
    SIP_ROUND;
    return v0 ^ v1 ^ v2 ^ v3;
}

table *table_new(unsigned columns)
{
    table *self = calloc(1, sizeof *self);
    if (self != NULL)
        self->columns = columns;
    return self;
}

void table_free(table *self)
{
    if (self == NULL)
        return;
    for (uint32_t chunk = 0; chunk < self->chunk_count; chunk++)
        free(self->chunks[chunk]);
    for (unsigned shard = 0; shard < SHARDS; shard++)
        free(self->shards[shard].slots);
    free(self->chunks);
    free(self);
}

size_t table_allocated(const table *self)
{
    size_t bytes = sizeof *self + self->chunk_room * sizeof *self->chunks + self->chunk_count * CHUNK;
    for (unsigned shard = 0; shard < SHARDS; shard++)
        if (self->shards[shard].slots != NULL)
            bytes += ((size_t)self->shards[shard].mask + 1) * sizeof(table_slot);
    return bytes;
}

static inline table_row *row_at(const table *self, uint32_t ref)
{
    size_t within = (size_t)(ref & ((1u << (CHUNK_BITS - ROW_BITS)) - 1)) << ROW_BITS;
    return (table_row *)(self->chunks[ref >> (CHUNK_BITS - ROW_BITS)] + within + self->columns * sizeof(uint64_t));
}

static size_t row_size(const table *self, size_t key)
{
    size_t size = self->columns * sizeof(uint64_t) + ROW_HEAD + key;
    return (size + (1 << ROW_BITS) - 1) & ~(size_t)((1 << ROW_BITS) - 1);
}

/* Room for a row; its ref, or 0 where there is no memory. */
static uint32_t allocate(table *self, size_t size)
{
    if (size > CHUNK - 8)
        return 0;
    if (self->chunk_count == 0 || self->filled + size > CHUNK) {
        if (self->chunk_count == MAX_CHUNKS)
            return 0;
        if (self->chunk_count == self->chunk_room) {
            uint32_t room = self->chunk_room ? 2 * self->chunk_room : 8;
            uint8_t **chunks = realloc(self->chunks, room * sizeof *chunks);
            if (chunks == NULL)
                return 0;
            self->chunks = chunks;
            self->chunk_room = room;
        }
        uint8_t *chunk = malloc(CHUNK);
        if (chunk == NULL)
            return 0;
        memset(chunk, 0, 8); /* no row begins here, so that no ref is 0 and a rest says that it is one */
        if (self->chunk_count) /* no key has such a size: the walk ends here */
            memset(self->chunks[self->chunk_count - 1] + self->filled, 0xff, CHUNK - self->filled);
        self->chunks[self->chunk_count++] = chunk;
        self->filled = 8;
    }
    uint32_t ref = (self->chunk_count - 1) << (CHUNK_BITS - ROW_BITS) | (uint32_t)(self->filled >> ROW_BITS);
    self->filled += size;
    self->held += size;
    return ref;
}

static int grow(table_shard *shard)
{
    uint32_t count = shard->slots ? 2 * (shard->mask + 1) : FIRST_SLOTS;
    table_slot *slots = calloc(count, sizeof *slots);
    if (slots == NULL)
        return 0;
    for (uint32_t index = 0; shard->slots != NULL && index <= shard->mask; index++) {
        table_slot slot = shard->slots[index];
        if (!slot.ref)
            continue;
        uint32_t at = slot.hash & (count - 1);
        while (slots[at].ref)
            at = (at + 1) & (count - 1);
        slots[at] = slot;
    }
    free(shard->slots);
    shard->slots = slots;
    shard->mask = count - 1;
    return 1;
}

table_row *table_find(table *self, const hash_key *secret, const uint8_t *key, size_t size)
{
    uint64_t whole = hash_bytes(secret, key, size);
    uint32_t hash = (uint32_t)whole;
    table_shard *shard = &self->shards[whole >> 58];
    uint32_t at = 0;
    if (shard->slots != NULL) {
        for (at = hash & shard->mask; shard->slots[at].ref; at = (at + 1) & shard->mask) {
            if (shard->slots[at].hash != hash)
                continue;
            table_row *row = row_at(self, shard->slots[at].ref);
            if (row->size == size && memcmp(row->key, key, size) == 0)
                return row;
        }
    }
    if (shard->slots == NULL || 4 * (uint64_t)(shard->used + 1) > 3 * ((uint64_t)shard->mask + 1)) {
        if (!grow(shard))
            return NULL;
        for (at = hash & shard->mask; shard->slots[at].ref; at = (at + 1) & shard->mask)
            ;
    }
    uint32_t ref = allocate(self, row_size(self, size));
    if (!ref)
        return NULL;
    table_row *row = row_at(self, ref);
    memset(table_sums(self, row), 0, self->columns * sizeof(uint64_t));
    row->count = 0;
    row->size = (uint16_t)size;
    memcpy(row->key, key, size);
    shard->slots[at] = (table_slot){hash, ref};
    shard->used++;
    self->rows++;
    return row;
}

const table_row *table_next(table *self, uint32_t *chunk, size_t *at)
{
    for (; *chunk < self->chunk_count; free(self->chunks[*chunk]), self->chunks[*chunk] = NULL, ++*chunk, *at = 0) {
        size_t end = *chunk + 1 == self->chunk_count ? self->filled : CHUNK;
        if (*at == 0)
            *at = 8;
        size_t head = *at + self->columns * sizeof(uint64_t);
        if (head + ROW_HEAD > end)
            continue;
        const table_row *row = (const table_row *)(self->chunks[*chunk] + head);
        if (row->size > MAX_KEY)
            continue;
        *at += row_size(self, row->size);
        return row;
    }
    return NULL;
}
