// Slurm's plug-in (SPANK): --image=REF for srun, sbatch and salloc, and the entry of a step's tasks into the image.
//
// Where the user is (srun, sbatch, salloc) it passes the options on, to the Prolog as SPANK_MUSTER_IMAGE and to the step's tasks as
// MUSTER_STEP_IMAGE. On a node, for a step that has an image:
//
//  1. init_post_opt (root) leaves an empty file jobs/slurm-JOB, so that the Epilog knows that there may be something to release.
//  2. user_init (as the user, once per step and node) runs "muster hook slurm step" as the user. That makes user and mount namespaces
//     of the user's own with the image as their root; this opens them, and lets it end. MUSTER_ENTERS tells the TaskProlog so.
//  3. task_init (as the user, in each task, before the TaskProlog) joins them, goes to the task's working directory and gives up
//     gaining privileges. A task that cannot join ends here, whatever plugstack.conf says of failing plug-ins.
//
// A step without image, and the batch script, are left alone: nothing is opened, run or set.
// Everything that decides anything is in muster, where it is tested; what the user says is passed on as it is, never to a shell.
//
//	plugstack.conf:  optional /usr/lib/muster/spank_muster.so muster=/usr/bin/muster jobs=/run/muster/jobs [config=/etc/muster/agent.yaml]

#include <sys/types.h>
#include <stdint.h> // spank.h uses it without saying so
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

SPANK_PLUGIN(muster, 1);

#define MAX_REF 1024
#define MAX_LINE (1 << 20)        // one line of muster: an environment's value
#define MAX_SAID (8 << 20)        // all that muster says
#define MAX_WAIT (60 * 60 * 1000) // ms; muster has a bound of its own below this

static const char *muster = "/usr/bin/muster", *config, *jobs = "/run/muster/jobs";
static char *image, *binds, *ready;
static int user_ns = -1, mount_ns = -1; // of this step's root
static int wanted;                      // this step has to enter

static int keep(char **to, const char *what, const char *value)
{
	size_t i, n = value ? strlen(value) : 0;

	if (n == 0 || n > MAX_REF) {
		slurm_error("muster: --%s: 1 to %d characters", what, MAX_REF);
		return -1;
	}
	for (i = 0; i < n; i++)
		if (value[i] <= ' ' || value[i] > '~') {
			slurm_error("muster: --%s: blanks and control characters cannot be in it", what);
			return -1;
		}
	free(*to);
	*to = strdup(value);
	return *to ? 0 : -1;
}

static int on_image(int val, const char *arg, int remote) { return keep(&image, "image", arg); }
static int on_bind(int val, const char *arg, int remote) { return keep(&binds, "image-bind", arg); }
static int on_ready(int val, const char *arg, int remote) { return keep(&ready, "image-ready", arg); }

static struct spank_option options[] = {
	{ "image", "REF", "run in this container image; 'none' in a job that has one: on the host", 1, 0, on_image },
	{ "image-bind", "SRC[:DST[:ro]],...", "show these of the host in the image", 1, 0, on_bind },
	{ "image-ready", "HOW", "mounted, warm or complete: how much of the image to wait for", 1, 0, on_ready },
};

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	size_t i;

	for (int k = 0; k < ac; k++) {
		if (!strncmp(av[k], "muster=", 7))
			muster = av[k] + 7;
		else if (!strncmp(av[k], "config=", 7))
			config = av[k] + 7;
		else if (!strncmp(av[k], "jobs=", 5))
			jobs = av[k] + 5;
		else
			slurm_error("muster: plugstack.conf: unknown argument %s", av[k]);
	}
	if (spank_context() == S_CTX_SLURMD || spank_context() == S_CTX_JOB_SCRIPT)
		return 0;
	for (i = 0; i < sizeof options / sizeof *options; i++)
		if (spank_option_register(sp, &options[i]) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

// is_step says whether a step is one that enters: not a batch script, nor what Slurm starts by itself.
static int is_step(uint32_t step)
{
	return step < SLURM_MAX_NORMAL_STEP_ID;
}

static int here(spank_t sp, uint32_t *job, uint32_t *step)
{
	return spank_get_item(sp, S_JOB_ID, job) == ESPANK_SUCCESS && spank_get_item(sp, S_JOB_STEPID, step) == ESPANK_SUCCESS;
}

int slurm_spank_init_post_opt(spank_t sp, int ac, char **av)
{
	int context = spank_context(), fd;
	uint32_t job, step;
	char path[PATH_MAX];

	if (context == S_CTX_LOCAL || context == S_CTX_ALLOCATOR) {
		if (image && spank_job_control_setenv(sp, "MUSTER_IMAGE", image, 1) != ESPANK_SUCCESS)
			return -1;
		if (ready && spank_job_control_setenv(sp, "MUSTER_READY", ready, 1) != ESPANK_SUCCESS)
			return -1;
		if (context == S_CTX_LOCAL) { // this environment goes to the tasks
			if (image)
				setenv("MUSTER_STEP_IMAGE", image, 1);
			else
				unsetenv("MUSTER_STEP_IMAGE");
		}
		return 0;
	}
	if (context != S_CTX_REMOTE || !image || !strcmp(image, "none") || !here(sp, &job, &step) || !is_step(step))
		return 0;
	wanted = 1;
	mkdir(jobs, 0711);
	if (snprintf(path, sizeof path, "%s/slurm-%u", jobs, job) < (int)sizeof path) {
		fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0400);
		if (fd >= 0)
			close(fd);
	}
	return 0;
}

// child becomes "muster hook slurm step", as the user for good: slurmstepd has only lent us his rights.
static void child(int in, int out, char **env)
{
	char *argv[] = { (char *)muster, "hook", "slurm", "step", config ? "--config" : NULL, (char *)config, NULL };
	int null = open("/dev/null", O_RDWR);
	sigset_t none;

	if (null < 0 || dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(null, 2) < 0)
		_exit(126);
	for (int fd = 3; fd < 1024; fd++)
		close(fd);
	for (int s = 1; s < NSIG; s++)
		signal(s, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (setresgid(getegid(), getegid(), getegid()) || setresuid(geteuid(), geteuid(), geteuid()))
		_exit(126);
	setsid();
	execve(muster, argv, env);
	_exit(127);
}

static int open_ns(long pid, const char *which)
{
	char path[64];

	snprintf(path, sizeof path, "/proc/%ld/ns/%s", pid, which);
	return open(path, O_RDONLY | O_CLOEXEC);
}

// line does what one line of muster says. It returns 1 after the last one.
static int line(spank_t sp, char *l)
{
	char *rest = strchr(l, ' '), *value;
	long pid;

	if (!rest)
		return 0;
	*rest++ = 0;
	if (!strcmp(l, "say")) {
		slurm_spank_log("muster: %s", rest);
	} else if (!strcmp(l, "fail")) {
		slurm_error("muster: %s", rest);
		return 1;
	} else if (!strcmp(l, "env") && (value = strchr(rest, '='))) {
		*value++ = 0;
		spank_setenv(sp, rest, value, 1);
	} else if (!strcmp(l, "pid") && (pid = strtol(rest, NULL, 10)) > 1) {
		user_ns = open_ns(pid, "user");
		mount_ns = open_ns(pid, "mnt");
		if (user_ns < 0 || mount_ns < 0)
			slurm_error("muster: the image's namespaces: %m");
		return 1;
	}
	return 0;
}

// listen does what muster says, until its last line.
static void listen_to(spank_t sp, int fd)
{
	size_t have = 0, said = 0, size = 1 << 16;
	char *buf = malloc(size), *end;
	struct pollfd p = { .fd = fd, .events = POLLIN };
	ssize_t n;

	while (buf) {
		if (have + 1 >= size) {
			char *more = size < MAX_LINE ? realloc(buf, size * 2) : NULL;
			if (!more)
				break;
			buf = more;
			size *= 2;
		}
		if (poll(&p, 1, MAX_WAIT) < 0 && errno == EINTR)
			continue;
		n = p.revents ? read(fd, buf + have, size - have - 1) : 0;
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0 || (said += n) > MAX_SAID) {
			slurm_error("muster: %s ended without a word", muster);
			break;
		}
		have += n;
		buf[have] = 0;
		while ((end = strchr(buf, '\n'))) {
			*end++ = 0;
			if (line(sp, buf)) {
				free(buf);
				return;
			}
			have -= end - buf;
			memmove(buf, end, have + 1);
		}
	}
	free(buf);
}

// pass makes "NAME=value" for the child, from the job's environment where value is NULL.
static char *pass(spank_t sp, const char *name, const char *value)
{
	char *kv = NULL, buf[4096];

	if (!value) {
		if (spank_getenv(sp, name, buf, sizeof buf) != ESPANK_SUCCESS)
			buf[0] = 0;
		value = buf;
	}
	if (asprintf(&kv, "%s=%s", name, value) < 0)
		return NULL;
	return kv;
}

int slurm_spank_user_init(spank_t sp, int ac, char **av)
{
	uint32_t job, step, node = 0;
	int in[2], out[2], n = 0, status;
	char *env[16], *conf = getenv("SLURM_CONF");
	char number[24], order[24], hosts[4096] = "", enters[64], cwd[PATH_MAX];
	pid_t pid;

	if (!wanted || !here(sp, &job, &step))
		return 0;
	spank_get_item(sp, S_JOB_NODEID, &node); // of the names in the environment some are another node's
	if (spank_getenv(sp, "SLURM_STEP_NODELIST", hosts, sizeof hosts) != ESPANK_SUCCESS)
		spank_getenv(sp, "SLURM_NODELIST", hosts, sizeof hosts);
	if (spank_getenv(sp, "PWD", cwd, sizeof cwd) != ESPANK_SUCCESS)
		cwd[0] = 0;
	snprintf(number, sizeof number, "%u", job);
	snprintf(order, sizeof order, "%u", node);
	env[n++] = "PATH=/usr/local/bin:/usr/bin:/bin";
	env[n++] = pass(sp, "HOME", NULL);
	env[n++] = pass(sp, "MUSTER_IMAGE", image);
	env[n++] = pass(sp, "MUSTER_READY", ready ? ready : "");
	env[n++] = pass(sp, "MUSTER_BIND", binds ? binds : "");
	env[n++] = pass(sp, "MUSTER_HOSTS", hosts);
	env[n++] = pass(sp, "MUSTER_WORKDIR", cwd);
	env[n++] = pass(sp, "SLURM_JOB_ID", number);
	env[n++] = pass(sp, "SLURM_NODEID", order);
	env[n++] = pass(sp, "SLURM_CONF", conf ? conf : "");
	env[n] = NULL;
	for (int k = 0; k < n; k++)
		if (!env[k])
			return -1;
	if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC)) {
		slurm_error("muster: %m");
		return -1;
	}
	pid = fork();
	if (pid == 0)
		child(in[0], out[1], env);
	close(in[0]);
	close(out[1]);
	if (pid > 0)
		listen_to(sp, out[0]);
	else
		slurm_error("muster: %m");
	close(in[1]); // it ends
	close(out[0]);
	while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	for (int k = 1; k < n; k++)
		free(env[k]);
	if (user_ns < 0 || mount_ns < 0)
		return -1;
	snprintf(enters, sizeof enters, "%u.%u.%u", job, step, node);
	return spank_setenv(sp, "MUSTER_ENTERS", enters, 1) == ESPANK_SUCCESS ? 0 : -1;
}

int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	char cwd[PATH_MAX];

	if (!wanted)
		return 0;
	if (!getcwd(cwd, sizeof cwd))
		strcpy(cwd, "/");
	// The user namespace is this user's, so joining it gives the right to join the other; executing the command takes it away again.
	if (user_ns < 0 || mount_ns < 0 || setns(user_ns, CLONE_NEWUSER) || setns(mount_ns, CLONE_NEWNS)) {
		dprintf(2, "muster: image %s is not entered on this node: the task is not run%s%s\n", image,
			user_ns < 0 || mount_ns < 0 ? "" : ": ", user_ns < 0 || mount_ns < 0 ? "" : strerror(errno));
		_exit(1); // never outside of the image, whatever Slurm makes of a plug-in that fails
	}
	if (chdir(cwd)) {
		dprintf(2, "muster: %s is not in the image (--image-bind shows it): starting in /\n", cwd);
		if (chdir("/"))
			_exit(1);
	}
	// Executing the program may wait for its first bytes. proctrack/linuxproc spares processes that are called like slurmstepd, as this one
	// is until then: a job that is cancelled meanwhile would drain the node.
	prctl(PR_SET_NAME, "muster-task", 0, 0, 0);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) {
		dprintf(2, "muster: image %s: no_new_privs: %m\n", image);
		_exit(1);
	}
	return 0;
}

int slurm_spank_exit(spank_t sp, int ac, char **av)
{
	if (user_ns >= 0)
		close(user_ns);
	if (mount_ns >= 0)
		close(mount_ns);
	user_ns = mount_ns = -1;
	return 0;
}
