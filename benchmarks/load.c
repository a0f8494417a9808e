/* The load generator: keeps many connections busy, each with one request under way, and counts the answers.
 *
 * It says "open" when everything is connected, begins at a line of its standard input, waits for the answers that are
 * under way when the time is over, and stays until its standard input ends: whoever measures the server in between
 * measures requests and nothing else.
 *
 *   load tcp   PORT CONNECTIONS SIZE SECONDS     echo over TCP
 *   load tls   PORT CONNECTIONS SIZE SECONDS     echo over TLS
 *   load udp   PORT CONNECTIONS SIZE SECONDS     echo over UDP, a socket for each "connection"
 *   load conn  PORT CONNECTIONS SIZE SECONDS     connect, one echo, close
 *   load talk  PORT CONNECTIONS SIZE SECONDS     send the file LOAD_REQUEST, receive SIZE bytes; on each connection the
 *                                                file LOAD_OPENING first, if given, answered by LOAD_OPENING_SIZE bytes
 *   load serve 0    0           SIZE SECONDS     accept and close what comes; prints its port first
 *
 * Prints the number of answers and the seconds it took. Has to be faster than any server that it measures: a slower
 * generator makes the server's batches, and so its cost for each request, bistable.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_TLS
#include <openssl/ssl.h>
#endif

enum { BATCH = 256 };

struct connection {
    int fd;
    size_t to_send;    /* of the request under way */
    size_t to_receive; /* of its answer */
    int waits_to_write;
#ifdef WITH_TLS
    SSL *ssl;
#endif
};

static char *payload, *answer, *opening;
static size_t size; /* of a request */
static size_t answer_size, opening_size, opening_answer_size;
static int mode_udp, mode_conn, poller;
static struct sockaddr_in server;
static unsigned long answers;
static int stopping; /* No more requests. */
#ifdef WITH_TLS
static SSL_CTX *context;
#endif

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* Some processors copy several times slower to or from an address that is a few bytes off a page, where `malloc` puts
 * what is large. */
static char *allocate_pages(size_t count) {
    void *pages = mmap(NULL, count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) fail("mmap");
    return pages;
}

static char *read_file(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    char *content = allocate_pages(1 << 18);
    *length = fread(content, 1, 1 << 18, file);
    fclose(file);
    return content;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void watch(struct connection *c, int write, int operation) {
    struct epoll_event event = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = c};
    c->waits_to_write = write;
    if (epoll_ctl(poller, operation, c->fd, &event)) fail("epoll_ctl");
}

static void open_connection(struct connection *c) {
    int one = 1;
    c->fd = socket(AF_INET, mode_udp ? SOCK_DGRAM : SOCK_STREAM, 0);
    if (c->fd < 0) fail("socket");
    if (!mode_udp) setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (mode_conn) {
        /* A reset instead of TIME_WAIT: the ports would run out. */
        struct linger linger = {1, 0};
        setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    }
    if (connect(c->fd, (struct sockaddr *)&server, sizeof server)) fail("connect");
    if (opening) {
        if (send(c->fd, opening, opening_size, MSG_NOSIGNAL) != (long)opening_size) fail("send");
        if (recv(c->fd, answer, opening_answer_size, MSG_WAITALL) != (long)opening_answer_size) fail("recv");
    }
#ifdef WITH_TLS
    if (context) {
        c->ssl = SSL_new(context);
        SSL_set_fd(c->ssl, c->fd);
        if (SSL_connect(c->ssl) != 1) fail("SSL_connect");
    }
#endif
    fcntl(c->fd, F_SETFL, fcntl(c->fd, F_GETFL) | O_NONBLOCK);
    watch(c, 0, EPOLL_CTL_ADD);
}

static long put(struct connection *c, const char *data, size_t count) {
#ifdef WITH_TLS
    if (c->ssl) {
        int sent = SSL_write(c->ssl, data, count);
        if (sent > 0) return sent;
        errno = EAGAIN;
        return -1;
    }
#endif
    return send(c->fd, data, count, MSG_NOSIGNAL);
}

static long get(struct connection *c) {
#ifdef WITH_TLS
    if (c->ssl) {
        int received = SSL_read(c->ssl, answer, 1 << 18);
        if (received > 0) return received;
        if (SSL_get_error(c->ssl, received) == SSL_ERROR_ZERO_RETURN) return 0;
        errno = EAGAIN;
        return -1;
    }
#endif
    return recv(c->fd, answer, 1 << 18, 0);
}

static void request(struct connection *c) {
    while (c->to_send) {
        long sent = put(c, payload + size - c->to_send, c->to_send);
        if (sent < 0) {
            if (errno != EAGAIN) fail("send");
            break;
        }
        c->to_send -= sent;
    }
    if (!!c->to_send != c->waits_to_write) watch(c, !!c->to_send, EPOLL_CTL_MOD);
}

static void start(struct connection *c) {
    c->to_send = size;
    c->to_receive = answer_size;
    request(c);
}

static void ready(struct connection *c, int events) {
    if (events & EPOLLOUT) request(c);
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
    for (;;) {
        long received = get(c);
        if (received < 0 && errno == EAGAIN) return;
        if (received < 0) fail("recv");
        if (received == 0 && !mode_udp) {
            fprintf(stderr, "the server closed a connection\n");
            exit(1);
        }
        c->to_receive -= (size_t)received < c->to_receive ? (size_t)received : c->to_receive;
        if (!c->to_receive) {
            answers++;
            if (mode_conn) {
                close(c->fd);
                if (!stopping) open_connection(c);
            }
            if (!stopping) start(c);
            return; /* Everybody in turn. */
        }
    }
}

static void serve(double seconds) {
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    struct timeval timeout = {.tv_sec = (long)seconds, .tv_usec = (long)((seconds - (long)seconds) * 1e6)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) fail("listen");
    getsockname(listener, (struct sockaddr *)&address, &length);
    setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) break;
        struct linger linger = {1, 0};
        /* The peer closes first; a reset leaves no TIME_WAIT behind. */
        while (recv(fd, answer, 1 << 18, 0) > 0) {}
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
        close(fd);
        answers++;
    }
}

int main(int argc, char **argv) {
    struct epoll_event events[BATCH];
    struct rlimit limit;
    if (argc != 6) {
        fprintf(stderr, "usage: load MODE PORT CONNECTIONS SIZE SECONDS\n");
        return 2;
    }
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    mode_udp = !strcmp(argv[1], "udp");
    mode_conn = !strcmp(argv[1], "conn");
    server.sin_family = AF_INET;
    server.sin_port = htons(atoi(argv[2]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int count = atoi(argv[3]);
    size = answer_size = atol(argv[4]);
    double seconds = atof(argv[5]);
    payload = allocate_pages(size + 1);
    if (!strcmp(argv[1], "talk")) {
        payload = read_file(getenv("LOAD_REQUEST"), &size);
        if (getenv("LOAD_OPENING")) {
            opening = read_file(getenv("LOAD_OPENING"), &opening_size);
            opening_answer_size = atol(getenv("LOAD_OPENING_SIZE"));
        }
    }
    answer = allocate_pages(1 << 18);
    if (!strcmp(argv[1], "serve")) {
        serve(seconds);
        printf("%lu\n", answers);
        return 0;
    }
#ifdef WITH_TLS
    if (!strcmp(argv[1], "tls")) {
        context = SSL_CTX_new(TLS_client_method());
        SSL_CTX_set_verify(context, SSL_VERIFY_NONE, NULL);
        SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        signal(SIGPIPE, SIG_IGN);
    }
#else
    if (!strcmp(argv[1], "tls")) {
        fprintf(stderr, "compiled without OpenSSL\n");
        return 3;
    }
#endif
    poller = epoll_create1(0);
    struct connection *connections = calloc(count, sizeof *connections);
    for (int i = 0; i < count; i++) open_connection(&connections[i]);
    /* Connections that do nothing, beside those that do. */
    const char *idle = getenv("LOAD_IDLE");
    int idle_count = idle ? atoi(idle) : 0;
    struct connection *idlers = calloc(idle_count + 1, sizeof *idlers);
    for (int i = 0; i < idle_count; i++) open_connection(&idlers[i]);
    printf("open\n");
    fflush(stdout);
    getchar();
    double begin = now(), end = begin + seconds, last = begin;
    for (int i = 0; i < count; i++) start(&connections[i]);
    unsigned long all = 0;
    while (!stopping || (answers < all && now() - last < 0.2)) {
        int n = epoll_wait(poller, events, BATCH, stopping ? 10 : 100);
        if (n > 0) last = now();
        for (int i = 0; i < n; i++) ready(events[i].data.ptr, events[i].events);
        if (!stopping && now() >= end) {
            stopping = 1;
            all = answers + count;
        }
        if (mode_udp && !stopping && n == 0 && now() - last > 0.2)
            /* A datagram was dropped: ask again. */
            for (int i = 0; i < count; i++) start(&connections[i]);
    }
    printf("%lu %.6f\n", answers, now() - begin);
    fflush(stdout);
    while (getchar() != EOF) continue;
    return 0;
}
