// Package jobhooks is what every scheduler's hooks have in common: the Job that a scheduler's environment comes down to, and the verdict
// on how its image went. Reading an environment, and saying a verdict in a scheduler's own language, is the business of
// jobhooks/slurm and jobhooks/flux. Nothing here asks anybody or touches a file.
//
// How a hook goes:
//
//  1. The scheduler starts muster with an environment. The scheduler's package makes a Job of it, or says that no image was asked
//     for, which is the end. What the user wrote (option, comment, attribute) is hostile: it is an image's reference by the
//     caller's parser, printable and bounded, or the Job is refused.
//  2. The caller asks the agent to stage the image, until the Job's deadline at most, and gets an Outcome.
//  3. Judge makes a Verdict of it, and the scheduler's package says it: a job is held with a message, queued again, or goes on. Only
//     Broken, when the node itself is to blame, may cost the node its place.
//
// A job that asked for an image runs no task outside of it, whatever the verdict: that is for the scheduler's plug-in, which
// enters the image or ends the step. So a hook may always get out of the way.
package jobhooks
