/* Reads whole files with O_DIRECT and several threads into memory that was touched before: what the disk gives.

   raw_direct THREADS BLOCK_BYTES FILE...
   Says "ready", waits for a line, reads, says {"usable_s": SECONDS}. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ull
#define HUGE_PAGE (2ull << 20)

struct block {
    int file;
    uint64_t offset, length; /* length is rounded up to a page: O_DIRECT reads the last one short */
    char *into;
};

static struct block *blocks;
static uint64_t block_count;
static char **paths;
static atomic_ullong next_block;

static void fail(const char *what, const char *where) {
    fprintf(stderr, "%s: %s: %s\n", what, where, strerror(errno));
    exit(1);
}

static uint64_t rounded(uint64_t size, uint64_t step) { return (size + step - 1) / step * step; }

static void *work(void *fds_of_all) {
    int *fds = fds_of_all;
    for (;;) {
        uint64_t number = atomic_fetch_add(&next_block, 1);
        if (number >= block_count) return NULL;
        struct block *block = &blocks[number];
        uint64_t done = 0;
        while (done < block->length) {
            ssize_t got = pread(fds[block->file], block->into + done, block->length - done, block->offset + done);
            if (got < 0) fail("pread", paths[block->file]);
            done += got;
            if (got == 0 || got % PAGE) break; /* the file's end */
        }
    }
}

int main(int count, char **words) {
    if (count < 4) return 2;
    int threads = atoi(words[1]), files = count - 3;
    uint64_t block_bytes = strtoull(words[2], NULL, 10), total = 0;
    paths = words + 3;
    int *fds = calloc(files, sizeof *fds);
    uint64_t *sizes = calloc(files, sizeof *sizes);
    for (int file = 0; file < files; file++) {
        struct stat status;
        fds[file] = open(paths[file], O_RDONLY | O_DIRECT | O_CLOEXEC);
        if (fds[file] < 0 || fstat(fds[file], &status)) fail("open", paths[file]);
        sizes[file] = status.st_size;
        total += rounded(sizes[file], PAGE);
        block_count += rounded(sizes[file], block_bytes) / block_bytes;
    }
    char *memory = mmap(NULL, total + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap", "memory");
    memory = (char *)rounded((uint64_t)memory, HUGE_PAGE);
    madvise(memory, total, MADV_HUGEPAGE);
    memset(memory, 1, total);
    blocks = calloc(block_count, sizeof *blocks);
    uint64_t made = 0, placed = 0;
    for (int file = 0; file < files; file++) {
        for (uint64_t offset = 0; offset < sizes[file]; offset += block_bytes) {
            uint64_t left = sizes[file] - offset;
            uint64_t length = rounded(left < block_bytes ? left : block_bytes, PAGE);
            blocks[made++] = (struct block){file, offset, length, memory + placed + offset};
        }
        placed += rounded(sizes[file], PAGE);
    }
    puts("ready");
    fflush(stdout);
    if (getchar() == EOF) return 1;
    struct timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    pthread_t *workers = calloc(threads, sizeof *workers);
    for (int thread = 0; thread < threads; thread++) pthread_create(&workers[thread], NULL, work, fds);
    for (int thread = 0; thread < threads; thread++) pthread_join(workers[thread], NULL);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("{\"usable_s\": %.6f}\n", ended.tv_sec - begun.tv_sec + (ended.tv_nsec - begun.tv_nsec) / 1e9);
    return 0;
}
