// Slurm's TaskProlog: variables for a task, and the guard of its image. Slurm runs it as the user for each task, after the plug-in
// (muster.c) has entered the image, so it may run inside of one: it is linked statically and needs nothing but itself.
//
// Beside it lies "jobs", a link to the directory hooks.jobs, which muster's prolog keeps.
//
// A step that asked for an image, on a node where no plug-in has entered it, ends here: never a task outside of its image. For all others
// it prints what Slurm is to export, and for most nothing.

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *env(const char *name)
{
	const char *v = getenv(name);

	return v ? v : "";
}

int main(void)
{
	const char *image = env("MUSTER_STEP_IMAGE"), *job = env("SLURM_JOB_ID"), *step = env("SLURM_STEP_ID"), *node = env("SLURM_NODEID");
	char enters[PATH_MAX], path[PATH_MAX], rootfs[PATH_MAX], *end;
	ssize_t n;

	if (*image && *step && strcmp(image, "none")) { // the batch script has no step, and stays on the host
		if (snprintf(enters, sizeof enters, "%s.%s.%s", job, step, node) >= (int)sizeof enters || strcmp(enters, env("MUSTER_ENTERS"))) {
			// Slurm shows a TaskProlog's "print" lines only, before the task's own output.
			printf("print muster: image %.200s: node %.100s has not entered it, its Slurm plug-in is missing or failed: the task is not run\n",
				image, env("SLURMD_NODENAME"));
			return 1;
		}
		printf("unset MUSTER_ENTERS\nexport MUSTER_JOB=slurm-%s\n", job);
		return 0;
	}
	if (!*job || strspn(job, "0123456789") != strlen(job))
		return 0;
	n = readlink("/proc/self/exe", enters, sizeof enters - 1);
	if (n <= 0)
		return 0;
	enters[n] = 0;
	if ((end = strrchr(enters, '/')))
		*end = 0;
	if (snprintf(path, sizeof path, "%s/jobs/slurm-%s.rootfs", enters, job) >= (int)sizeof path)
		return 0;
	n = readlink(path, rootfs, sizeof rootfs - 1);
	if (n <= 0)
		return 0; // no image, or it is not there yet
	rootfs[n] = 0;
	if (strchr(rootfs, '\n'))
		return 0;
	printf("export MUSTER_JOB=slurm-%s\nexport MUSTER_ROOTFS=%s\n", job, rootfs);
	return 0;
}
