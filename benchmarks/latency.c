/* A read-only file system that passes a folder through and answers each read after a while, many at a time. `latency.py`
   builds and mounts it: latency FOLDER MICROSECONDS AT_ONCE MOUNT [options of FUSE]. When it is unmounted, it prints what
   was asked of it as JSON: requests, bytes, the most that were in flight, and the mean while any was. */
#define FUSE_USE_VERSION 312
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int root, at_once;
static struct timespec wait_for;
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;
static long requests, bytes, flying, most;
static double since, busy, area;

static const char *below(const char *path) { return path[1] ? path + 1 : "."; }

static void count(int change, long read) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    pthread_mutex_lock(&counting);
    double now = time.tv_sec + time.tv_nsec / 1e9;
    if (flying) {
        busy += now - since;
        area += flying * (now - since);
    }
    since = now;
    flying += change;
    requests += change > 0;
    bytes += read;
    most = flying > most ? flying : most;
    pthread_mutex_unlock(&counting);
}

static void *slow_init(struct fuse_conn_info *conn, struct fuse_config *cfg) {
    conn->max_background = conn->congestion_threshold = at_once;
    cfg->kernel_cache = 1;
    cfg->attr_timeout = cfg->entry_timeout = 600;
    return NULL;
}

static void slow_destroy(void *data) {
    (void)data;
    printf("{\"requests\": %ld, \"bytes\": %ld, \"most\": %ld, \"mean\": %.2f}\n", requests, bytes, most,
           busy ? area / busy : 0);
    fflush(stdout);
}

static int slow_getattr(const char *path, struct stat *found, struct fuse_file_info *file) {
    (void)file;
    return fstatat(root, below(path), found, 0) ? -errno : 0;
}

static int slow_readdir(const char *path, void *into, fuse_fill_dir_t fill, off_t offset, struct fuse_file_info *file,
                        enum fuse_readdir_flags flags) {
    (void)offset, (void)file, (void)flags;
    int fd = openat(root, below(path), O_RDONLY | O_DIRECTORY);
    DIR *folder = fd < 0 ? NULL : fdopendir(fd);
    if (!folder) return -errno;
    for (struct dirent *one; (one = readdir(folder));) fill(into, one->d_name, NULL, 0, 0);
    closedir(folder);
    return 0;
}

static int slow_open(const char *path, struct fuse_file_info *file) {
    int fd = openat(root, below(path), O_RDONLY);
    file->fh = fd;
    return fd < 0 ? -errno : 0;
}

static int slow_read(const char *path, char *into, size_t size, off_t offset, struct fuse_file_info *file) {
    (void)path;
    count(1, 0);
    clock_nanosleep(CLOCK_MONOTONIC, 0, &wait_for, NULL);
    ssize_t got = pread(file->fh, into, size, offset);
    count(-1, got > 0 ? got : 0);
    return got < 0 ? -errno : (int)got;
}

static int slow_release(const char *path, struct fuse_file_info *file) {
    (void)path;
    return close(file->fh);
}

int main(int argc, char **argv) {
    static const struct fuse_operations operations = {.init = slow_init,       .destroy = slow_destroy,
                                                      .getattr = slow_getattr, .readdir = slow_readdir,
                                                      .open = slow_open,       .read = slow_read,
                                                      .release = slow_release};
    if (argc < 5 || (root = open(argv[1], O_RDONLY | O_DIRECTORY)) < 0) return 2;
    wait_for.tv_nsec = atol(argv[2]) * 1000;
    at_once = atoi(argv[3]);
    argv[3] = argv[0];
    return fuse_main(argc - 3, argv + 3, &operations, NULL);
}
