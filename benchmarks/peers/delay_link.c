/* A link between two network namespaces: one TUN device in each, bytes held back by a token bucket and a delay.

   delay_link NETNS_A DEVICE_A NETNS_B DEVICE_B BYTES_PER_S DELAY_US QUEUE_BYTES
   BYTES_PER_S and DELAY_US are those of each direction; a rate of 0 is no limit. Says "ready" once both devices
   exist, runs until its standard input ends.

   The devices hand over batches of TCP segments (up to 64 KiB, with a header that says how to cut them); they are
   charged as the packets that they stand for. While more than QUEUE_BYTES wait for the bucket, nothing is read from
   the device: the sender's own queue then holds it back, as a full network card would, and nothing is lost. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PACKET_BYTES_MAX (sizeof(struct virtio_net_hdr) + 65536)
#define HEADER_BYTES 52ull /* IPv4 and TCP with time stamps */

struct packet {
    struct packet *next;
    int64_t due_ns;
    ssize_t length;
    char bytes[];
};

struct direction {
    int from, to;
    struct packet *first, *last;
    int64_t free_ns; /* when the bucket will have sent all that it was given */
};

static double ns_per_byte;
static int64_t delay_ns, ahead_ns;
static char buffer[PACKET_BYTES_MAX];

static void fail(const char *what, const char *where) {
    fprintf(stderr, "delay_link: %s %s: %s\n", what, where, strerror(errno));
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static int open_device(const char *netns, const char *name) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", netns);
    int space = open(path, O_RDONLY | O_CLOEXEC);
    if (space < 0 || setns(space, CLONE_NEWNET)) fail("setns", netns);
    close(space);
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tun < 0) fail("open", "/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
    snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
    if (ioctl(tun, TUNSETIFF, &request)) fail("TUNSETIFF", name);
    if (ioctl(tun, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)) fail("TUNSETOFFLOAD", name);
    return tun;
}

static void take_all(struct direction *way) {
    for (;;) {
        int64_t now = now_ns();
        if (way->free_ns < now) way->free_ns = now;
        if (ns_per_byte > 0 && way->free_ns - now > ahead_ns) return;
        ssize_t length = read(way->from, buffer, sizeof buffer);
        if (length < 0) {
            if (errno == EAGAIN || errno == EINTR) return;
            fail("read", "device");
        }
        struct virtio_net_hdr *head = (struct virtio_net_hdr *)buffer;
        uint64_t wire = length - sizeof *head;
        if (head->gso_type != VIRTIO_NET_HDR_GSO_NONE && head->gso_size) {
            uint64_t data = wire > HEADER_BYTES ? wire - HEADER_BYTES : 0;
            uint64_t segments = (data + head->gso_size - 1) / head->gso_size;
            if (segments > 1) wire += (segments - 1) * HEADER_BYTES;
        }
        way->free_ns += (int64_t)(wire * ns_per_byte);
        struct packet *packet = malloc(sizeof *packet + length);
        if (packet == NULL) fail("malloc", "packet");
        *packet = (struct packet){NULL, way->free_ns + delay_ns, length};
        memcpy(packet->bytes, buffer, length);
        if (way->first == NULL) way->first = packet; else way->last->next = packet;
        way->last = packet;
    }
}

static void give_due(struct direction *way) {
    int64_t now = now_ns();
    while (way->first != NULL && way->first->due_ns <= now) {
        struct packet *packet = way->first;
        /* A device whose queue is full drops, as a network does. */
        if (write(way->to, packet->bytes, packet->length) < 0 && errno != EAGAIN && errno != ENOBUFS && errno != EIO)
            fail("write", "device");
        way->first = packet->next;
        free(packet);
    }
}

int main(int count, char **words) {
    if (count != 8) return 2;
    prctl(PR_SET_TIMERSLACK, 1);
    double rate = atof(words[5]);
    ns_per_byte = rate > 0 ? 1e9 / rate : 0;
    delay_ns = atoll(words[6]) * 1000;
    ahead_ns = (int64_t)(atof(words[7]) * ns_per_byte);
    int one = open_device(words[1], words[2]), other = open_device(words[3], words[4]);
    struct direction ways[2] = {{.from = one, .to = other}, {.from = other, .to = one}};
    puts("ready");
    fflush(stdout);
    for (;;) {
        int64_t now = now_ns(), wake = now + 1000000000;
        struct pollfd polled[3] = {{.fd = one}, {.fd = other}, {.fd = 0, .events = POLLIN}};
        for (int way = 0; way < 2; way++) {
            if (ways[way].first != NULL && ways[way].first->due_ns < wake) wake = ways[way].first->due_ns;
            int64_t ready = ways[way].free_ns - ahead_ns;
            if (ns_per_byte == 0 || ready <= now) polled[way].events = POLLIN;
            else if (ready < wake) wake = ready;
        }
        int64_t left = wake > now ? wake - now : 0;
        struct timespec limit = {left / 1000000000, left % 1000000000};
        if (ppoll(polled, 3, &limit, NULL) < 0 && errno != EINTR) fail("ppoll", "devices");
        if (polled[2].revents) {
            char byte;
            if (read(0, &byte, 1) <= 0) return 0;
        }
        for (int way = 0; way < 2; way++) {
            take_all(&ways[way]);
            give_due(&ways[way]);
        }
    }
}
