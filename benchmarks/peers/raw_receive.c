/* Receives objects over HTTP on several connections into memory that was touched before: what link and server give.

   raw_receive CONNECTIONS BLOCK_BYTES ADDRESS PORT PATH SIZE [PATH SIZE]...
   Says "ready", waits for a line, connects and receives, says {"usable_s": SECONDS}. Checks status and lengths, no
   content. The blocks are taken in order, each by the connection that is free. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HUGE_PAGE (2ull << 20)
#define HEAD_BYTES_MAX 8192

struct block {
    const char *path;
    uint64_t offset, length;
    char *into;
};

static struct block *blocks;
static uint64_t block_count;
static atomic_ullong next_block;
static struct sockaddr_in server;

static void fail(const char *what, const char *where) {
    fprintf(stderr, "%s: %s: %s\n", what, where, strerror(errno));
    exit(1);
}

static void receive(int sock, struct block *block) {
    char head[HEAD_BYTES_MAX + 1];
    int length = snprintf(head, sizeof head, "GET %s HTTP/1.1\r\nHost: origin\r\nRange: bytes=%llu-%llu\r\n\r\n",
                          block->path, (unsigned long long)block->offset,
                          (unsigned long long)(block->offset + block->length - 1));
    if (send(sock, head, length, MSG_NOSIGNAL) != length) fail("send", block->path);
    int got = 0;
    char *end = NULL;
    while (end == NULL) {
        ssize_t more = recv(sock, head + got, HEAD_BYTES_MAX - got, 0);
        if (more <= 0) fail("recv", block->path);
        head[got += more] = 0;
        end = strstr(head, "\r\n\r\n");
    }
    if (strncmp(head, "HTTP/1.1 206", 12)) fail("not a 206", block->path);
    uint64_t done = head + got - (end + 4);
    memcpy(block->into, end + 4, done);
    while (done < block->length) {
        ssize_t more = recv(sock, block->into + done, block->length - done, MSG_WAITALL);
        if (more <= 0) fail("recv", block->path);
        done += more;
    }
}

static void *work(void *unused) {
    (void)unused;
    int one = 1, sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(sock, (struct sockaddr *)&server, sizeof server)) fail("connect", "server");
    for (;;) {
        uint64_t number = atomic_fetch_add(&next_block, 1);
        if (number >= block_count) break;
        receive(sock, &blocks[number]);
    }
    close(sock);
    return NULL;
}

int main(int count, char **words) {
    if (count < 7 || count % 2 == 0) return 2;
    int connections = atoi(words[1]);
    uint64_t block_bytes = strtoull(words[2], NULL, 10), total = 0;
    server.sin_family = AF_INET;
    server.sin_port = htons(atoi(words[4]));
    if (inet_pton(AF_INET, words[3], &server.sin_addr) != 1) return 2;
    for (int word = 5; word < count; word += 2) {
        uint64_t size = strtoull(words[word + 1], NULL, 10);
        total += size;
        block_count += (size + block_bytes - 1) / block_bytes;
    }
    char *memory = mmap(NULL, total + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap", "memory");
    memory = (char *)(((uint64_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    madvise(memory, total, MADV_HUGEPAGE);
    memset(memory, 1, total);
    blocks = calloc(block_count, sizeof *blocks);
    uint64_t made = 0;
    for (int word = 5; word < count; word += 2) {
        uint64_t size = strtoull(words[word + 1], NULL, 10);
        for (uint64_t offset = 0; offset < size; offset += block_bytes) {
            uint64_t left = size - offset, length = left < block_bytes ? left : block_bytes;
            blocks[made++] = (struct block){words[word], offset, length, memory};
            memory += length;
        }
    }
    puts("ready");
    fflush(stdout);
    if (getchar() == EOF) return 1;
    struct timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    pthread_t *workers = calloc(connections, sizeof *workers);
    for (int number = 0; number < connections; number++) pthread_create(&workers[number], NULL, work, NULL);
    for (int number = 0; number < connections; number++) pthread_join(workers[number], NULL);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("{\"usable_s\": %.6f}\n", ended.tv_sec - begun.tv_sec + (ended.tv_nsec - begun.tv_nsec) / 1e9);
    return 0;
}
